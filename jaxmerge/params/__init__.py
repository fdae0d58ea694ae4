"""Pillar 3: which weights become one? Merges of whole models as chains of atoms, in optax's grammar.

    tx = chain(trim(0.2), elect_sign(), mean_agreeing(), scale(1.0))     a MergeTransform(match, merge)
    merged = merge(tx, base, models)                                     task_vectors, match, merge, add

A merge looks at statistics before it touches an entry (`needs`): sums, order statistics, singular vectors, data; of a row, a
tensor or the model. Values stay where they are; what travels is small. "Equal to" names the vectors in tests/golden/params,
outputs of the official code at the arguments that each docstring gives (mergekit 0.1.5, fusion_bench 0.2.33).

    atoms: all K models stay, then one
      trim, trim_band, select_variance     the largest, a band, varying   order             ties, breadcrumbs, sce
      random_mask, rank_mask, mask         at random, by rank, given      random, order     dare, della
      rescale, weigh, scale, truncate      norms, coefficients, low rank  sums, spectral    dare, twin_merging
      elect_sign, sum_experts,             agreement, then a sum, a mean, counts            ties
        mean_agreeing, max_agreeing        the largest
      elect_largest, interpolate,          by sign and size; two models   sums              fusion_bench_emr, slerp
        spherical
      chain, per_leaf, partition, exclude, put together, your own, by name, scanned layers
        keep_base, per_layer
    merge (seed)                           idea                           looks at          equal to
      linear                               model soups                    -                 mergekit_linear
      task_arithmetic                      scaled sum                     -                 mergekit_task_arithmetic
      ties                                 trim, elect, average           order             mergekit_ties, mergellm_ties,
                                                                                            mergekit_ties_rescale,
                                                                                            fusion_bench_ties,
                                                                                            fusion_bench_ties_max
      dare_linear, dare_ties               drop at random, rescale        random, l1        mergekit_dare_linear, mergelm_dare,
                                                                                            mergekit_dare_ties,
                                                                                            fusion_bench_dare_task_arithmetic
      breadcrumbs, breadcrumbs_ties        neither large nor small        order             mergekit_breadcrumbs,
                                                                                            mergekit_breadcrumbs_ties,
                                                                                            mergellm_breadcrumbs
      della, della_linear                  drop by rank                   rows, random      mergekit_della,
                                                                                            mergekit_della_linear
      magmax                               the largest                    -                 fusion_bench_magmax
      sce, varm: FuseChat (4)              weigh by squares               order, sums       fusechat_sce, mergekit_sce,
                                                                                            mergekit_sce_full
      ram, ramplus_tl                      changed by one or by several   counts            mergekit_ram, mergekit_ramplus_tl
      pcb (69)                             entries compete                order             pcb
      consensus, tall_masks                where several tasks speak      -                 fusion_bench_tall_mask
      emr -> Masked                        one vector, a mask per task    sums              fusion_bench_emr
      slerp, nuslerp                       two models on the sphere       sums              mergekit_slerp, fusion_bench_slerp,
                                                                                            mergekit_nuslerp,
                                                                                            mergekit_nuslerp_nobase
      multislerp, karcher                  means on the sphere            sums              mergekit_multislerp,
                                                                                            mergekit_karcher
      model_stock                          the angle between experts      sums              mergekit_model_stock,
                                                                                            fusion_bench_model_stock
      nearswap, arcee_fusion, passthrough  from one model into the base   order             mergekit_nearswap,
                                                                                            mergekit_arcee_fusion,
                                                                                            mergekit_arguments
      widen (5)                            columns that moved             norms, ranks      widen
      tsvm, r_tsvm (66), tsv_compress      singular vectors, orthogonal   spectral          fusion_bench_tsvm
      iso_c, iso_cts (polar)               equal singular values          spectral          fusion_bench_iso_c,
                                                                                            fusion_bench_iso_cts
      knots                                any merge, in a shared basis   spectral          fusion_bench_knots
      wudi                                 least interference             spectral          fusion_bench_wudi
      regmean (gram)                       least squares                  data, spectral    fusion_bench_regmean
      fisher (fisher_information)          certainty                      data              fusion_bench_fisher
      adamerging (74) (fit, entropy)       learned coefficients           -                 fusion_bench_adamerging_layerwise,
                                                                                            fusion_bench_adamerging_taskwise
      expert_merging (16): chunks          learned, distilled             -                 expert_merging_apply
        expert_coefficients, chunk_importance, allocate_chunks; distillation, hidden_mse, drift
      self_positioning (83)                a learned position             -                 the rule
      evo_merging (30) (evolve)            searched without gradients     order             the rule
      twin_merging (37): twin_split,       shared and own parts, a router spectral          twin_merging
        twin_serve; init_router, fit_router, route -> Router
      layer_swapping (72), select_layers   layers of several models       -                 yaml_layer_swap,
                                                                                            yaml_layer_swap_transition
      update_selective (114)               the largest updates            order             the rule
      window_average                       checkpoints of one run (WSM)   -                 the rule
      concatenate (21), compress, dense,   adapters that stay Factors     -                 lora_combine
        adapt, fit_adapters
      match_weights, permute, pleas (79),  units in another order, merged on the host       gitrebasin
        merge_units, unit_budget, unit_gains   all or in part
      lock (42), lock_matrices,            the same function, unmergeable -                 mergelock
        lock_suspicion (Attention)
    around them
      gradient, by_name, by_model,         hyperparameters by leaf                          yaml_linear_gradient,
        layer_of                                                                            yaml_slerp_gradient,
                                                                                            yaml_ties_gradient
      align_vocabularies, align_embeddings other vocabularies                               yaml_tokenizer
      matching_pursuit, nearest_points,    embeddings of new tokens                         tokensurgeon_omp,
        combine, rotate_points                                                              tokensurgeon_common_interpolation,
                                                                                            tokensurgeon_landmark_pca
      cosines, sign_conflict, task_norms,  what there is to merge
        draw_tasks
      nonfinite                            NaN and inf, by leaf
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
from jaxmerge.params.entries._fisher import fisher as fisher
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
from jaxmerge.params.spectral._gram import gram as gram, regmean as regmean, wudi as wudi
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
