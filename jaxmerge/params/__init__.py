"""Pillar 3: which weights become one? Merges of whole models as chains of atoms, in optax's grammar.

MergeTransform(match, merge)                     chain, per_leaf, needs -> Need: what it looks at
partition, exclude, keep_base, per_layer         different merges for different leaves; scanned layers, each for itself
task_vectors, add, merge                         models in, a model out; nonfinite reports NaN and inf
trim, trim_band, select_variance                 atoms that keep all K models: the largest, a band, what varies
random_mask, rank_mask, mask, rescale            ... masks, and making up for them
weigh, scale, truncate, elect_sign               ... coefficients, low rank, zero the models that disagree
sum_experts, mean_agreeing, max_agreeing         K models to one
elect_largest, interpolate, spherical            ... by sign and size; two models to one

linear, task_arithmetic, ties, dare_linear, dare_ties                                  task vectors, one chain each
breadcrumbs, breadcrumbs_ties, della, della_linear, magmax                             ... bands, ranks, the largest
sce, varm, ram, ramplus_tl, pcb, consensus, update_selective                           ... by what changed, and where
slerp, nuslerp, multislerp, karcher, model_stock                                       on the sphere
passthrough, nearswap, arcee_fusion                                                    one model and the base
tsvm, r_tsvm, iso_c, iso_cts, knots                                                    singular vectors; polar is their tool
fisher (fisher_information), regmean (gram), wudi, widen                               statistics of data, or of columns
adamerging, expert_merging, self_positioning                                           coefficients; fit learns them (entropy)
expert_coefficients, chunk_importance, allocate_chunks                                 ... by distillation, hidden_mse, drift
evo_merging                                                                            ... evolve searches for them -> Evolution
select_layers, layer_swapping, window_average                                          layers of several models; one run
gradient (layer_of), by_name, by_model                                                 hyperparameters by the leaf's name

emr, tall_masks -> Masked                        one vector for all tasks, a mask for each
twin_split, twin_serve, twin_merging             what is shared, and each task's own as Factors
tsv_compress                                     ... each task as Factors: TSV-C
init_router, fit_router, route -> Router         ... which task an input is of
concatenate, compress, dense                     adapters that stay Factors; adapt adds one, fit_adapters weighs them
match_weights, permute, merge_units, pleas       units in another order, merged all or in part; layers solved for
unit_budget, unit_gains                          ... how many of each layer, if the network may cost so much
align_vocabularies -> Alignment                  models of different vocabularies: align_embeddings, then merge
matching_pursuit, nearest_points, combine        embeddings of tokens that a model lacks; rotate_points
cosines, sign_conflict, task_norms               what there is to merge; draw_tasks draws it
lock (lock_matrices), lock_suspicion: Attention  weights that compute the same and cannot be merged
"""

from jaxmerge.params._aliases import (
    breadcrumbs as breadcrumbs,
    breadcrumbs_ties as breadcrumbs_ties,
    dare_linear as dare_linear,
    dare_ties as dare_ties,
    della as della,
    della_linear as della_linear,
    linear as linear,
    magmax as magmax,
    slerp as slerp,
    task_arithmetic as task_arithmetic,
    ties as ties,
)
from jaxmerge.params._names import (
    by_model as by_model,
    by_name as by_name,
    gradient as gradient,
    layer_of as layer_of,
)
from jaxmerge.params._partition import exclude as exclude, keep_base as keep_base, partition as partition
from jaxmerge.params._scanned import per_layer as per_layer
from jaxmerge.params._stack import (
    add as add,
    merge as merge,
    nonfinite as nonfinite,
    task_vectors as task_vectors,
)
from jaxmerge.params._transform import (
    MergeTransform as MergeTransform,
    Need as Need,
    chain as chain,
    needs as needs,
    per_leaf as per_leaf,
)
from jaxmerge.params.analysis._analysis import cosines as cosines, sign_conflict as sign_conflict, task_norms as task_norms
from jaxmerge.params.analysis._pictures import draw_tasks as draw_tasks
from jaxmerge.params.atoms._consensus import (
    elect_sign as elect_sign,
    max_agreeing as max_agreeing,
    mean_agreeing as mean_agreeing,
    sum_experts as sum_experts,
)
from jaxmerge.params.atoms._layers import (
    layer_swapping as layer_swapping,
    select_layers as select_layers,
    update_selective as update_selective,
    window_average as window_average,
)
from jaxmerge.params.atoms._masks import (
    Masked as Masked,
    consensus as consensus,
    elect_largest as elect_largest,
    emr as emr,
    mask as mask,
    tall_masks as tall_masks,
)
from jaxmerge.params.atoms._random import random_mask as random_mask, rank_mask as rank_mask
from jaxmerge.params.atoms._scale import rescale as rescale, scale as scale, weigh as weigh
from jaxmerge.params.atoms._trim import trim as trim, trim_band as trim_band
from jaxmerge.params.entries._overlap import ram as ram, ramplus_tl as ramplus_tl
from jaxmerge.params.entries._pcb import pcb as pcb
from jaxmerge.params.entries._sce import sce as sce, select_variance as select_variance, varm as varm
from jaxmerge.params.entries._swap import arcee_fusion as arcee_fusion, nearswap as nearswap, passthrough as passthrough
from jaxmerge.params.entries._widen import widen as widen
from jaxmerge.params.learned._evolve import Evolution as Evolution, evo_merging as evo_merging, evolve as evolve
from jaxmerge.params.learned._expert import (
    allocate_chunks as allocate_chunks,
    chunk_importance as chunk_importance,
    distillation as distillation,
    drift as drift,
    expert_coefficients as expert_coefficients,
    expert_merging as expert_merging,
    hidden_mse as hidden_mse,
)
from jaxmerge.params.learned._fisher import Information as Information, fisher_information as fisher_information
from jaxmerge.params.learned._learned import (
    adamerging as adamerging,
    entropy as entropy,
    fit as fit,
    self_positioning as self_positioning,
)
from jaxmerge.params.learned._router import (
    Router as Router,
    fit_router as fit_router,
    init_router as init_router,
    route as route,
)
from jaxmerge.params.spectral._adapters import (
    Factors as Factors,
    adapt as adapt,
    compress as compress,
    concatenate as concatenate,
    dense as dense,
    fit_adapters as fit_adapters,
)
from jaxmerge.params.spectral._gram import fisher as fisher, gram as gram, regmean as regmean, wudi as wudi
from jaxmerge.params.spectral._polar import polar as polar
from jaxmerge.params.spectral._spectral import (
    iso_c as iso_c,
    iso_cts as iso_cts,
    knots as knots,
    truncate as truncate,
)
from jaxmerge.params.spectral._tsv import r_tsvm as r_tsvm, tsv_compress as tsv_compress, tsvm as tsvm
from jaxmerge.params.spectral._twin import (
    twin_merging as twin_merging,
    twin_serve as twin_serve,
    twin_split as twin_split,
)
from jaxmerge.params.sphere._geometry import interpolate as interpolate, spherical as spherical
from jaxmerge.params.sphere._sphere import karcher as karcher, multislerp as multislerp, nuslerp as nuslerp
from jaxmerge.params.sphere._stock import model_stock as model_stock
from jaxmerge.params.units._budget import unit_budget as unit_budget, unit_gains as unit_gains
from jaxmerge.params.units._lock import (
    Attention as Attention,
    lock as lock,
    lock_matrices as lock_matrices,
    lock_suspicion as lock_suspicion,
)
from jaxmerge.params.units._permute import match_weights as match_weights, permute as permute
from jaxmerge.params.units._units import merge_units as merge_units, pleas as pleas
from jaxmerge.params.vocabulary._align import (
    Alignment as Alignment,
    align_embeddings as align_embeddings,
    align_vocabularies as align_vocabularies,
)
from jaxmerge.params.vocabulary._vocabulary import (
    combine as combine,
    matching_pursuit as matching_pursuit,
    nearest_points as nearest_points,
    rotate_points as rotate_points,
)
