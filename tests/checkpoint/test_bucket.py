"""Merges from and into a bucket, through tensorstore alone: as in a folder here; cut off at any moment, they go on."""

import os
import pathlib

import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from jaxmerge import checkpoint, cli, params, recipe
from jaxmerge.checkpoint import _probe
from jaxmerge.checkpoint._remote import Url, folder

from .bucket import serving

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax, of a load without a target


@pytest.fixture(scope="module")
def bucket():
    """A server for the whole process: tensorstore asks once where buckets are."""
    with serving() as (url, kind):
        os.environ |= {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}
        yield kind


@pytest.fixture(scope="module")
def parents(models, bucket, tmp_path_factory):
    """{name: gs://...}: base and a in safetensors, b in Orbax; and where they lie here."""
    paths, trees = models
    root = tmp_path_factory.mktemp("parents")
    ocp.save(root / "b", trees["b"])
    here = {"base": paths["base"], "a": paths["a"], "b": root / "b"}
    store = ts.KvStore.open("gs://parents/").result()
    for name, path in here.items():
        for file in (f for f in path.rglob("*") if f.is_file()):
            store.write(f"{name}/{file.relative_to(path)}", file.read_bytes()).result()
    return {name: f"gs://parents/{name}" for name in here}, here


def fetched(url: str, folder: pathlib.Path) -> pathlib.Path:
    for name in Url(url).all_names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((Url(url) / name).read_bytes())
    return folder


def test_as_in_a_folder_here(parents, bucket, tmp_path, capsys):
    (there, here), tx = parents, params.ties(0.3)
    options = {"format": "orbax", "memory": "1MB", "beside": {"README.md": "a card"}}
    want = checkpoint.merge(tx, here["base"], [here["a"], here["b"]], tmp_path / "want", on_devices=True, **options)
    before = bucket.read
    planned = checkpoint.plan(tx, there["base"], [there["a"], there["b"]])
    assert not planned.problems and bucket.read - before < 20_000  # headers alone
    checkpoint.merge(tx, there["base"], [there["a"], there["b"]], "gs://out/merged", **options)
    assert Url("gs://out").names() == ["merged"]
    loaded, same = ocp.load(fetched("gs://out/merged", tmp_path / "got")), ocp.load(tmp_path / "want")
    assert loaded.keys() == same.keys()
    for name, leaf in same.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), np.asarray(leaf))
        assert loaded[name].sharding == want.headers.shardings[name]
    found = checkpoint.verify("gs://out/merged", tx)
    assert not found.problems and len(found.leaves) == 6
    assert cli.main(["inspect", "gs://out/merged", str(tmp_path / "want"), "--by-layer"]) == 0
    with pytest.raises(FileExistsError, match="--overwrite"):
        checkpoint.merge(tx, there["base"], [there["a"]], "gs://out/merged", **options)
    checkpoint.merge(params.linear(), there["base"], [there["a"]], "gs://out/merged", format="orbax", overwrite=True)
    assert not (Url("gs://out/merged") / "README.md").exists()  # of the earlier merge
    assert sum("/ocdbt.process_" in name for name in Url("gs://out/merged").all_names()) == 2  # a manifest, the arrays
    with pytest.raises(FileExistsError, match="no merge has made it"):
        checkpoint.merge(tx, there["base"], [there["a"]], there["b"], format="orbax", overwrite=True)
    with pytest.raises(checkpoint.MergeError, match="written to local paths, gs:// and s3://"):
        checkpoint.merge(tx, there["base"], [there["a"]], "https://host/out", format="orbax")


@pytest.mark.slow
def test_cut_off_at_any_moment(parents, bucket):
    """After n objects have been written the bucket takes no more; the same merge then goes on and ends with the same values."""
    (_, here), tx, mean, out = parents, params.ties(0.3), params.linear(), "gs://cut/merged"
    merge = lambda tx, out: checkpoint.merge(
        tx, here["base"], [here["a"], here["b"]], out, format="orbax", memory="200kB", overwrite=True
    )
    bucket.changes = 0
    merge(tx, "gs://cut/want")
    total, want = bucket.changes, checkpoint.open("gs://cut/want")
    went_on = 0
    for n in range(1, total, 2):
        merge(mean if n % 4 == 1 else tx, out)  # another merge, or the same once more
        earlier, bucket.changes, bucket.limit = checkpoint.open(out).read("big"), 0, n
        with pytest.raises(OSError, match="PERMISSION_DENIED"):
            merge(tx, out)
        bucket.limit = 10**9
        if (Url(out) / "_CHECKPOINT_METADATA").exists():
            got = checkpoint.open(out).read("big")
            assert np.array_equal(got, earlier) or np.array_equal(got, want.read("big"))
        report = merge(tx, out)
        went_on += report.resumed > 0
        got = checkpoint.open(out)
        for name in want.leaves:
            np.testing.assert_array_equal(got.read(name), want.read(name))
        assert not Url("gs://cut/merged.merging").all_names()
    assert went_on > total // 3


def test_a_recipe_of_a_run(models, bucket, tmp_path, capsys):
    """A window of a run's checkpoints, by the names of their items, and an output that verifies."""
    trees = models[1]
    store = ts.KvStore.open("gs://run/").result()
    for step, name in ((9, "a"), (10, "b"), (11, "c")):
        ocp.save(tmp_path / str(step), trees[name])
        for file in (f for f in (tmp_path / str(step)).rglob("*") if f.is_file()):
            store.write(f"{file.relative_to(tmp_path)}", file.read_bytes()).result()
    text = "merge_method: linear\nmodels: [{model: 'gs://run/{10..20}/state'}]\nparameters: {weight: 1}\n"
    (tmp_path / "recipe.yml").write_text(text)
    assert [m.name for m in recipe.plan(text)[0].headers.models] == ["gs://run/10/state", "gs://run/11/state"]
    assert cli.main(["merge", str(tmp_path / "recipe.yml"), "gs://run/soup"]) == 0
    assert cli.main(["verify", "gs://run/soup"]) == 0
    got = checkpoint.open("gs://run/soup").read("big")
    mean = (trees["b"]["big"].astype(np.float32) + trees["c"]["big"].astype(np.float32)) / 2
    np.testing.assert_allclose(got.astype(np.float32), mean, rtol=2**-8)


def test_where_buckets_are(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert folder("/a b/%20?#/") == {"driver": "file", "path": "/a b/%20?#/"}
    assert folder("gs://b/a/c/") == {"driver": "gcs", "bucket": "b", "path": "a/c/"}
    assert folder("s3://b/a/") == {"driver": "s3", "bucket": "b", "path": "a/"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert folder("s3://b/") == {
        "driver": "s3",
        "bucket": "b",
        "path": "",
        "endpoint": "http://minio:9000",
        "aws_region": "us-east-1",
    }


def test_doctor_probes_a_bucket(parents, bucket, monkeypatch, capsys):
    """It can be listed, read, written to and tidied up, or the right that is lacking is named."""
    there, _ = parents
    for place in ("a", "b"):
        findings = _probe.read(there[place])
        assert [f.step for f in findings] == ["list", "headers", "read"] and all(f.works for f in findings), findings
    before = dict(bucket.objects)
    assert [f.step for f in _probe.write("gs://out/new")] == ["create", "read", "remove"]
    assert bucket.objects == before
    [nothing] = _probe.read("gs://parents/none")
    assert nothing.step == "list" and "mind the spelling" in nothing.found
    monkeypatch.setattr(bucket, "limit", 0)
    [refused] = _probe.write("gs://out/new")
    assert not refused.works and "storage.objects.create, and a login: gcloud auth" in refused.found
