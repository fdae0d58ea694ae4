"""mergekit's methods: the parameters of each, with its defaults and meaning, and our chain for it.

A parameter is shared by the models of a slice, or has a value for each of its inputs, or for each that is not the base. One
that is static shapes the chain: tensors that differ in it are merged by different chains of one partition.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

from jaxmerge import params
from jaxmerge.params import MergeTransform
from jaxmerge.params._transform import Hyperparameter

REQUIRED: Any = object()


class Parameter(NamedTuple):
    """A parameter of a method.

    Attributes:
      kind: what values are: float, int, bool; None also lets "nothing" be a value.
      scope: one value, one for each input, or one for each input that is not the base.
      default: REQUIRED where there is none.
      static: shapes the chain.
      low, high: what values must lie between.
      words: what it can be beside its kind.
    """

    kind: type
    scope: Literal["shared", "input", "expert"] = "shared"
    default: Any = REQUIRED
    static: bool = False
    low: float | int | None = None
    high: float | int | None = None
    words: tuple[str, ...] = ()


class Method(NamedTuple):
    """A method of a recipe.

    Attributes:
      title, url: for the model card.
      base: "required": what the models were trained from, merged are task vectors; "first": the first of two models;
        "optional"; "input": an input like any other.
      least, most: how many inputs it takes beside the base.
      parameters: by the name that recipes use.
      build: their values -> the chain; a value that is not static is a function of the tensor's name.
      data: statistics of each model that it takes, from files: Fisher "information" in the shapes of the leaves, or "grams" of
        their inputs, under the leaves' names.
    """

    title: str
    url: str
    base: Literal["required", "first", "optional", "input"]
    least: int
    most: int | None
    parameters: dict[str, Parameter]
    build: Callable[[Mapping[str, Any]], MergeTransform]
    data: Literal["information", "grams"] | None = None


def number(default: Any = REQUIRED, low: float | int | None = None, high: float | int | None = None) -> Parameter:
    return Parameter(float, "shared", default, False, low, high)


def flag(default: bool, *words: str) -> Parameter:
    return Parameter(bool, "shared", default, True, words=words)


def fixed(kind: type, default: Any, low: float | int | None = None, high: float | int | None = None) -> Parameter:
    return Parameter(kind, "shared", default, True, low, high)


def of_experts(default: Any = REQUIRED, low: float | int | None = None, high: float | int | None = None) -> Parameter:
    return Parameter(float, "expert", default, False, low, high)


# --- task arithmetic: a mask, weights, signs, a sum or a mean, a factor ------------------------------------------------


def arithmetic(mask: Callable[[Mapping[str, Any]], MergeTransform] | None, *, signs: bool) -> Callable:
    """mask(task vector), rescaled; times weight; with the sign of their sum alone; summed or averaged; times lambda."""

    def build(v):
        steps = []
        if mask is not None:
            masked = mask(v)
            steps.append(params.rescale(masked, "l1") if v["rescale"] is True else masked)
        if signs:
            reduced = params.mean_agreeing(v["weight"]) if v["normalize"] else params.sum_experts()
            steps += [params.weigh(v["weight"]), params.elect_sign(), reduced]
        else:
            steps += [params.weigh(_shares(v["weight"]) if v["normalize"] else v["weight"]), params.sum_experts()]
        return params.chain(*steps, params.scale(v["lambda"]))

    return build


def _shares(weight: Callable[[str], list[float]]) -> Callable[[str], list[float]]:
    """Weights over their sum; as they are where it is zero, as mergekit has it."""

    def shares(name):
        w = weight(name)
        return [x / sum(w) for x in w] if abs(sum(w)) >= 1e-8 else w

    return shares


def _trim(v):
    return params.trim(v["density"], scope=v["scope"])


def _band(v):
    return params.trim_band(v["density"], v["gamma"], scope=v["scope"])


def _random(v):
    masked = params.random_mask(v["density"], seed=v["seed"])
    return params.rescale(masked, "inv_p") if v["rescale"] == "inv_p" else masked


def _ranked(v):
    return params.rank_mask(v["density"], v["epsilon"], seed=v["seed"], divide=v["rescale"] == "inv_p")


SCOPE = {"scope": Parameter(str, "shared", "tensor", True, words=("tensor", "model", "row"))}


def _task(title, url, mask, more=None, *, signs, normalize=False, rescale=False) -> Method:
    drawn = mask in (_random, _ranked)
    parameters = {
        "weight": of_experts(),
        "density": of_experts(1.0, 0, 1),
        "normalize": flag(normalize),
        "rescale": flag(rescale, *(["inv_p"] if drawn else [])),
        "lambda": number(1.0),
        "int8_mask": flag(False),
    }
    return Method(title, url, "required", 1, None, parameters | (more or {}), arithmetic(mask, signs=signs))


# --- the others ------------------------------------------------------------------------------------------------------


def _nuslerp(v):
    scope = "tensor" if v["nuslerp_flatten"] else "column" if v["nuslerp_row_wise"] else "row"
    return params.nuslerp(v["weight"], scope=scope)


WEIGHT, GAMMA, EPSILON = {"weight": of_experts()}, {"gamma": of_experts(0.01, 0, 1)}, {"epsilon": of_experts(0.15, 0, 1)}
ARXIV = "https://arxiv.org/abs/"

METHODS: dict[str, Method] = {
    "linear": Method(
        "Linear",
        ARXIV + "2203.05482",
        "input",
        1,
        None,
        {"weight": Parameter(float, "input"), "normalize": flag(True)},
        lambda v: params.linear(v["weight"], normalize=v["normalize"]),
    ),
    "slerp": Method(
        "SLERP",
        "https://en.wikipedia.org/wiki/Slerp",
        "first",
        1,
        1,
        {"t": number(low=0, high=1)},
        lambda v: params.slerp(v["t"]),
    ),
    "nuslerp": Method(
        "NuSLERP",
        "",
        "optional",
        2,
        2,
        WEIGHT | {"nuslerp_flatten": flag(True), "nuslerp_row_wise": flag(False)},
        _nuslerp,
    ),
    "multislerp": Method(
        "Multi-SLERP",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        "optional",
        1,
        None,
        WEIGHT | {"normalize_weights": flag(True), "eps": fixed(float, 1e-8, 0)},
        lambda v: params.multislerp(v["weight"], normalize=v["normalize_weights"], floor=v["eps"]),
    ),
    "karcher": Method(
        "Karcher Mean",
        ARXIV + "2603.04972",
        "input",
        1,
        None,
        {"max_iter": fixed(int, 10, 1), "tol": fixed(float, 1e-5, 0)},
        lambda v: params.karcher(iterations=v["max_iter"], tolerance=v["tol"]),
    ),
    "passthrough": Method(
        "Passthrough",
        "",
        "input",
        1,
        1,
        {"scale": Parameter(float, "input", None)},
        lambda v: params.passthrough(lambda name: [1.0 if s is None else s for s in v["scale"](name)]),
    ),
    "model_stock": Method(
        "Model Stock",
        ARXIV + "2403.19522",
        "required",
        2,
        None,
        {"filter_wise": flag(False)},
        lambda v: params.model_stock(scope="row" if v["filter_wise"] else "tensor", floor=1e-6),
    ),
    "arcee_fusion": Method("Arcee Fusion", "https://arcee.ai", "first", 1, 1, {}, lambda v: params.arcee_fusion()),
    "nearswap": Method(
        "NearSwap",
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        "required",
        1,
        1,
        {"t": number(low=0)},
        lambda v: params.nearswap(v["t"]),
    ),
    "sce": Method(
        "SCE",
        ARXIV + "2408.07990",
        "required",
        1,
        None,
        {"select_topk": fixed(float, 1.0, 0, 1), "int8_mask": flag(False)},
        lambda v: params.sce(v["select_topk"], mask="delta", floor=1e-6),
    ),
    "ram": Method(
        "Reinforced Agent Merging",
        ARXIV + "2601.13572",
        "required",
        1,
        None,
        {"epsilon": fixed(float, 1e-5, 0)},
        lambda v: params.ram(threshold=v["epsilon"]),
    ),
    "ramplus_tl": Method(
        "Reinforced Agent Merging Plus (tensor by tensor)",
        ARXIV + "2601.13572",
        "required",
        1,
        None,
        {"r": fixed(float, 0.1, 0), "alpha": fixed(float, 0.2, 0), "epsilon": fixed(float, 1e-5, 0)},
        lambda v: params.ramplus_tl(boost=v["r"], limit=v["alpha"], threshold=v["epsilon"]),
    ),
    "task_arithmetic": _task("Task Arithmetic", ARXIV + "2212.04089", None, signs=False),
    "ties": _task("TIES", ARXIV + "2306.01708", _trim, SCOPE, signs=True, normalize=True),
    "dare_ties": _task("DARE TIES", ARXIV + "2311.03099", _random, signs=True, rescale=True),
    "dare_linear": _task("Linear DARE", ARXIV + "2311.03099", _random, signs=False, rescale=True),
    "breadcrumbs": _task("Model Breadcrumbs", ARXIV + "2312.06795", _band, GAMMA | SCOPE, signs=False),
    "breadcrumbs_ties": _task("Model Breadcrumbs with TIES", ARXIV + "2312.06795", _band, GAMMA | SCOPE, signs=True),
    "della": _task("DELLA", ARXIV + "2406.11617", _ranked, EPSILON, signs=True, normalize=True, rescale=True),
    "della_linear": _task("Linear DELLA", ARXIV + "2406.11617", _ranked, EPSILON, signs=False, rescale=True),
}
MERGEKIT = frozenset(METHODS)


# --- methods that mergekit has not, by the parameters of their functions ----------------------------------------------


def _own(alias: Callable[..., MergeTransform], *, most: int | None = None) -> Method:
    """A function of `params` as a method: its hyperparameters have a value for each model, all else shapes the chain."""
    parameters = {}
    for p in inspect.signature(alias).parameters.values():
        default = REQUIRED if p.default is p.empty else p.default
        bounds = (0, 1) if p.name == "density" else (None, None)
        if p.annotation == Hyperparameter:
            shared = p.name in ("scale", "t")
            parameters[p.name] = Parameter(float, "shared" if shared else "expert", default, False, *bounds)
        elif get_origin(p.annotation) is Literal:
            parameters[p.name] = Parameter(str, "shared", default, True, words=get_args(p.annotation))
        elif p.annotation in (bool, int, float) and p.name != "seed":
            parameters[p.name] = Parameter(p.annotation, "shared", default, True, *bounds)
    build = lambda v: alias(**{n: v[n] for n in parameters})
    source = (alias.__doc__ or "").partition("arXiv:")[2][:10]
    return Method(alias.__name__, ARXIV + source if source else "", "required", 1, most, parameters, build)


METHODS |= {
    alias.__name__: _own(alias)
    for alias in (params.consensus, params.iso_c, params.iso_cts, params.magmax, params.pcb, params.tsvm, params.varm)
}
METHODS["update_selective"] = _own(params.update_selective, most=1)
METHODS["window_average"] = Method(
    "Window average",
    ARXIV + "2507.17634",
    "input",
    1,
    None,
    {
        "decay": Parameter(str, "shared", "linear", True, words=("linear", "cosine", "minus_sqrt", "ema")),
        "beta": fixed(float, 0.8, 0, 1),
    },
    lambda v: params.window_average(v["decay"], beta=v["beta"]),
)
AXIS = {"axis": fixed(int, REQUIRED, 0, 1)}  # of the inputs: of square matrices nobody can tell
METHODS |= {
    "fisher": Method(
        "Fisher-weighted averaging",
        ARXIV + "2111.09832",
        "input",
        1,
        None,
        {"weight": Parameter(float, "input", 1.0), "normalize": flag(True), "floor": fixed(float, 1e-6, 0)},
        lambda v: params.fisher(weight=v["weight"], normalize=v["normalize"], floor=v["floor"]),
        data="information",
    ),
    "regmean": Method(
        "RegMean",
        ARXIV + "2212.09849",
        "input",
        1,
        None,
        {"shrink": fixed(float, 0.9, 0, 1), "ridge": fixed(float, 1e-6, 0)} | AXIS,
        lambda v: params.regmean(shrink=v["shrink"], ridge=v["ridge"], axis=v["axis"]),
        data="grams",
    ),
    "wudi": Method(
        "WUDI-Merging",
        ARXIV + "2503.08099",
        "required",
        1,
        None,
        {"scale": fixed(float, 1.0), "cutoff": fixed(float, 1e-6, 0)} | AXIS,
        lambda v: params.wudi(scale=v["scale"], cutoff=v["cutoff"], axis=v["axis"]),
    ),
}
STATISTICS = "statistics"
"""Beside a model, under its parameters: where they lie."""
PARAMETERS = {STATISTICS} | {name for method in METHODS.values() for name in method.parameters}
