"""The official MrT5 and Hugging Face's ByT5, timed on demand: started by scripts.bench.mrt5 in a Python that has torch.

python mrt5_torch.py DIR MRT5 THREADS: DIR holds weights.npz (names as published), inputs.npz and config.json; MRT5 is a
checkout of jkallini/mrt5. A line on standard input names what to run ("byt5", "soft", "hard"; "+step" to train); a line of
JSON answers with seconds and what came out. It needs neither JAX nor this package.
"""
# pyright: reportMissingImports=false

import json
import sys
import time


def main(folder: str, checkout: str, threads: int) -> None:
    import numpy as np
    import torch
    import transformers

    sys.path.insert(0, checkout)
    from models.modeling_mrt5 import MrT5Config, MrT5ForConditionalGeneration

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        fields = json.load(file)
    weights = {k: torch.from_numpy(v) for k, v in np.load(f"{folder}/weights.npz").items()}
    inputs = {k: torch.from_numpy(v).long() for k, v in np.load(f"{folder}/inputs.npz").items()}
    known = {k: v for k, v in fields.items() if k not in ("architectures", "model_type", "tokenizer_class")}
    mrt5 = MrT5ForConditionalGeneration(MrT5Config(**known))
    fill(mrt5, weights)
    plain = transformers.T5Config(**{k: v for k, v in known.items() if k != "use_softmax1"})
    byt5 = transformers.T5ForConditionalGeneration(plain)
    own = dict(mrt5.named_parameters())
    for name, _ in list(byt5.named_parameters()):  # one set of numbers for both
        *path, leaf = name.split(".")
        module = byt5.get_submodule(".".join(path))
        setattr(module, leaf, own[name])
    byt5.encoder.embed_tokens = byt5.decoder.embed_tokens = byt5.shared
    optimiser = torch.optim.AdamW(mrt5.parameters(), lr=1e-4)
    batch = dict(input_ids=inputs["ids"], attention_mask=(inputs["ids"] != 0).long(), labels=inputs["labels"])

    def run(name: str) -> dict:
        kind, _, step = name.partition("+")
        model = byt5 if kind == "byt5" else mrt5
        extra = {} if kind == "byt5" else dict(hard_delete=kind == "hard")
        model.train(bool(step))  # dropout is 0
        wall, processor = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled(bool(step)):
            out = model(**batch, **extra)
            total = out.loss
            if kind != "byt5":
                gate = out.delete_gate_output.squeeze(-1)
                total = total + 0.01 * gate[inputs["ids"] != 0].mean()
        if step:
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seconds = time.process_time() - processor, time.perf_counter() - wall
        return {"cpu": seconds[0], "wall": seconds[1], "ce": float(out.loss.detach())}

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(line.strip())), flush=True)


def fill(model, weights: dict) -> None:
    """All parameters by name; what is missing or left over is an error."""
    wanted = dict(model.named_parameters())
    if wanted.keys() != weights.keys():
        raise ValueError(f"mrt5_torch: names differ: {sorted(wanted.keys() ^ weights.keys())[:8]}")
    for name, p in wanted.items():
        p.data.copy_(weights[name])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
