"""The house stands as it is drawn: imports point one way, the surface is what is listed, `import jaxmerge` is light."""

import ast
import importlib
import pathlib
import subprocess
import sys
import types

import pytest

import jaxmerge

ROOT = pathlib.Path(__file__).parent.parent
LIGHT = {"jax", "numpy", "jaxtyping", "jaxmerge"}
# What each room may import at module level, beside the standard library; functions may import what their room is for.
ALLOWED = {
    "jaxmerge": LIGHT,
    "jaxmerge/checkpoint": LIGHT | {"orbax", "tensorstore", "etils"},
    "jaxmerge/recipe": LIGHT | {"yaml", "etils"},
    "jaxmerge/cli.py": LIGHT | {"tyro", "rich"},
    "models": LIGHT | {"flax", "models"},
    "scripts": LIGHT | {"flax", "optax", "orbax", "rich", "tyro", "models", "scripts", "sklearn", "matplotlib", "PIL"},
}
BELOW = {
    "_segments": set(),
    "_collectives": set(),
    "_rank": {"_segments"},
    "_kernels": {"_segments", "_rank"},
    "_plan": {"_segments", "_kernels"},
    "attention": {"_plan", "_segments", "_kernels"},
    "tokens": {"_plan", "_segments", "_rank", "_kernels", "attention"},
    "virtual": {"_plan", "_segments", "attention"},
    "words": {"_plan", "attention", "tokens"},
    "params": {"_plan", "_collectives"},
    "checkpoint": {"_plan", "params"},
    "testing": {"_plan", "_collectives", "params"},
    "recipe": {"params", "checkpoint"},
    "_methods": {"params"},
    "_commands": {"_methods", "_kernels", "_roll_call", "params", "checkpoint", "recipe"},
    "_roll_call": set(),
    "cli": {"_methods", "_commands", "_roll_call", "params"},
}


def modules():
    return sorted(p for room in ("jaxmerge", "models", "scripts") for p in (ROOT / room).rglob("*.py"))


def imports(path, *, top_level_only):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    where = path.relative_to(ROOT).as_posix()
    allowed = max((room for room in ALLOWED if where.startswith(room)), key=len)
    for name in imports(path, top_level_only=True):
        top = name.split(".")[0]
        assert top in ALLOWED[allowed] or top in sys.stdlib_module_names, f"{where} imports {name} at module level"
    for name in imports(path, top_level_only=False):
        assert where.startswith("scripts") or not name.startswith("scripts"), f"{where} imports {name}"
        assert where.startswith(("scripts", "models")) or not name.startswith("models"), f"{where} imports {name}"
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "jaxmerge" and parts[1] in BELOW:
        for name in imports(path, top_level_only=False):
            room = name.split(".")[1] if name.startswith("jaxmerge.") else None
            assert room is None or room == parts[1] or room in BELOW[parts[1]], f"{where} imports {name}"


def test_no_file_outgrows_its_idea():
    long = {p.name: n for p in modules() if (n := len(p.read_text().splitlines())) > 500}
    assert not long, f"split by idea: {long}"


def test_import_is_light():
    code = "import sys, jaxmerge; jaxmerge.merge; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    )
    heavy = loaded & {"flax", "optax", "orbax", "tensorstore", "rich", "tyro", "regex", "safetensors", "matplotlib", "sklearn",
                      "models", "scripts", "torch", "tensorflow"}  # fmt: skip
    assert not heavy, f"import jaxmerge loads {heavy}"


SURFACE = {
    "jaxmerge": "Plan SoftPlan compose from_parents identity merge unmerge",
    "jaxmerge.attention": "MASKED append_bias key_bias packed_attention proportional_attention segment_mask",
    "jaxmerge.tokens": """LayerNorm MergeStep Nearest Packed RunningThreshold Weighted Windows adaptive_k_means
        adjacent_matching assign attention_and_density
        attention_and_similarity attention_inhibition attention_score bind bind_attributes bipartite_matching
        block_matching carry_positions center_weight clip_matching density_centers density_peaks
        depth_to_space dominant_and_contextual earlier_matching energy energy_matching exit_layer exit_plan
        flow_budget flow_cut flow_layers flow_score frame_attention frame_similarity from_groups grid_matching
        grid_pool halvings head_mean hiprune holitom in_order in_rounds inertia k_means keep keep_apart
        keep_schedule keep_top_k kth_bipartite_matching linear_decay local_matching local_outlier_factor
        margins matching_threshold matryoshka_pool members merge_step merged_similarity nearest nearest_center
        negative_merge pack page_rank page_rank_pruning primary_and_clusters propagate prune_and_merge
        random_bipartite_matching ranks recover redundant representatives rope_positions saliency_gather
        sample_by_correlation schedule sequence_pool silhouette soft_gather space_to_depth sparsify
        static_merging static_windows subgraph temporal_pairs threshold_matching token_graph token_transform
        trajectory_matching two_sided_matching visible_layers""",
    "jaxmerge.virtual": "merged_positions rotary virtual_attention",
    "jaxmerge.words": """BLT_THRESHOLD ByteModel Controller ControllerState Corrupted Covers DynamicTokens END EOS OFFSET PAD
        Packed Routing SENTINEL SEPARATORS SIZE UNK bits_per_byte byte_entropy byte_model cached_embeddings
        canonical_after canonical_pairs capacity_for corrupt cover_encodings dechunk delete_gate
        deletion_rate document_starts dynamic_tokens entropy_starts existence_bias fixed_gate gate_entropies
        kept limit_patches log_existence log_sigmoid_gate masked_mean masked_variance moving_average
        next_symbol ngram_hash no_start_probability pack pack_stream patch_threshold pi_controller
        place_in_word random_gate ratio_loss route sample_starts segments shift softmax1 space_starts
        span_counts span_lengths span_mask split starts straight_through to_bytes to_ids unpack
        word_existence""",
    "jaxmerge.params": """Alignment Attention Evolution Factors Information Masked MergeTransform Need Router adamerging
        adapt add align_embeddings align_vocabularies allocate_chunks arcee_fusion breadcrumbs
        breadcrumbs_ties by_model by_name chain chunk_importance combine compress concatenate consensus
        cosines dare_linear dare_ties della della_linear dense distillation draw_tasks drift elect_largest
        elect_sign emr entropy evo_merging evolve exclude expert_coefficients expert_merging fisher
        fisher_information fit fit_adapters fit_router gradient gram hidden_mse init_router interpolate
        iso_c iso_cts karcher keep_base knots layer_of layer_swapping linear lock lock_matrices
        lock_suspicion magmax mask match_weights matching_pursuit max_agreeing mean_agreeing merge
        merge_units model_stock multislerp nearest_points nearswap needs nonfinite nuslerp partition
        passthrough pcb per_layer per_leaf permute pleas polar r_tsvm ram ramplus_tl random_mask rank_mask regmean
        rescale rotate_points route scale sce select_layers select_variance self_positioning
        sign_conflict slerp spherical sum_experts tall_masks task_arithmetic task_norms task_vectors
        ties trim trim_band truncate tsv_compress tsvm twin_merging twin_serve twin_split unit_budget unit_gains
        update_selective varm weigh widen window_average wudi""",
    "jaxmerge.checkpoint": """CheckpointPlan Derived Leaf MergeError MergeReport Progress Source Verified dequantized derived
        fsdp merge
        open plan receipt renamed subset verify""",
    "jaxmerge.recipe": """Difference Extraction Mistake Recipe RecipeError RecipePlan differences extract merge plan read
        stacks verify""",
}


@pytest.mark.parametrize("module", SURFACE)
def test_public_names(module):
    """What a room offers, its modules apart; in files (not packages) what it imports from other places apart too."""
    room = importlib.import_module(module)
    offered = {n for n in dir(room) if not n.startswith("_") and not isinstance(getattr(room, n), types.ModuleType)}
    if not hasattr(room, "__path__"):
        offered = {n for n in offered if getattr(getattr(room, n), "__module__", module) == module}
    assert offered == set(SURFACE[module].split())


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxmerge.nothing  # noqa: B018


def test_top_level_holds_what_was_agreed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    agreed = {"pyproject.toml", "jaxmerge", "models", "scripts", "tests", "README.md", "LICENSE"}
    assert {t for t in top if not t.startswith(".")} == agreed
