"""Pillar 1: which tokens become one? Every planner is a pure function that returns a `Plan` or a `SoftPlan`.

Each drops into any model (`models.vit.ViT(...)(images, r=13, planner=...)`), composes with any other (`jm.compose`), runs
under jit, vmap, grad and a mesh, and unmerges. Of n tokens, r leave or m stay; c is a capacity with empty slots, where how
many stay depends on the data. A cost of n² is that many cosines, n² d multiply-adds. "Equal to" names the vectors in
tests/golden/tokens, outputs of the official code, or what stands in for it. Each docstring says where that code differs.

    planner                        method (seed)                looks at                 leaves  cost        equal to
    matching
      bipartite_matching           ToMe; TinyChart (44),        keys, mean over heads    n - r   n²/4        tome, tome_vit
                                   AuroraCap (47), SimVLG (50)  r: schedule, keep_schedule                   their published r
        merge_step                 the same, its merge and the norm behind, one kernel where there is one
      kth_bipartite_matching       ToMe, every k-th             keys                     n / k   n² (k-1)/k² tome
      random_bipartite_matching    ToMe, random sources         keys, a key              n - r   r (n - r)   tome
      two_sided_matching           any two lists of positions   any metric               n - r   a b         bipartite_matching
      grid_matching                tomesd                       block input, 2-D cells   n - r   3 n²/16     tomesd
      energy_matching              PiToMe (8), 3 variants       keys, mean similarity    n - r   n²          pitome
      threshold_matching           DyMU (22)                    keys, a threshold        c       n²/4        dymu
        matching_threshold, RunningThreshold                    its calibration          scalar  n²/4        dymu
      earlier_matching             B-VLLM (46)                  frames before            c       n²          the rule
      clip_matching                TempMe (111)                 clips joined             n - r   n²/4        tempme
      in_rounds                    LongVLM (48), AIM (19),      any planner, again       n - Σr  Σ of rounds longvlm, aim
                                   B-VLLM (46): halvings
      local_matching,              MergeDNA (6)                 keys within a band,      n - r   n window    the rule, as in
        block_matching                                          or within blocks         n - r   n block/4   OpenToMe
      adjacent_matching            MAELRE (120)                 keys of neighbours       n - r   n           the rule
      trajectory_matching          COVE (49)                    frames, 2-D window       c       n window²   the rule
    ranking and pruning
      keep, keep_top_k             EViT; MrT5 hard deletion     a mask, a score          c, k    rank        mrt5
        pack                       keep and its merge, one kernel where there is one
      hiprune                      HiPrune (23)                 attention of two layers  k       rank        hiprune
      flow_score, flow_cut,        FlowCut (136)                class attention, values  c       n d         flowcut
        flow_budget, flow_layers
      page_rank_pruning            AIM (19)                     attention as a walk      k       5 n²        aim
      dominant_and_contextual      VisionZip, VisionDrop (100)  attention, keys          m       n m         visiondrop_encoder
      sample_by_correlation        TokenCorrCompressor (109)    patches, class token     c       n²          the rule
      recover                      Recoverable Compression      class and text scores,   c       n²          scikit-learn's LOF
                                   (101)                        outlier factors
      prune_and_merge              DiffRate (54)                class attention, tokens  m       n m         diffrate
      assign                       kept tokens and the nearest  a mask, any metric       c       n c         the rule
      exit_layer, exit_plan        DyVTE (137)                  a router per layer       c       n           the rule
    clustering
      density_peaks                DPC-KNN: PPE (9), HoliTom    tokens                   k       n²          ppe, holitom
      static_merging, holitom      HoliTom (97)                 frames, attention        c       frames n d  holitom
      attention_and_density,       HoliTom (97), per frame and  attention, tokens        m       n²          holitom
        attention_and_similarity   inside the language model
      k_means, adaptive_k_means    VQToken (106)                tokens                   k       10 n k      Lloyd's rule
      primary_and_clusters         VMTC (55)                    score, tokens            m       10 n k      the rule
      members, carry_positions,    PPE (9)                      a plan, positions        m       n²          ppe
        rope_positions
    soft and propagating
      propagate                    GTP-ViT (112), 11 rules      attention, token_graph   m       n m         gtp
      token_transform              Token Transforming (91)      tokens, centres          m       n m         its two limits
      saliency_gather, soft_gather Isomer (51)                  logits, saliency         2 k, k  n k         the rule
      frame_attention              SimVLG (50)                  frames                   n       n²          the rule
    pooling and given groups
      grid_pool                    TokenFLEX (132), CrossLMM    nothing                  m       0           PyTorch's windows
      matryoshka_pool              M3 (53)                      nothing                  m       0           m3
      sequence_pool                ARC-Encoder (89)             nothing                  m       0           the rule
      temporal_pairs               On-device Sora (45)          nothing                  n / 2   0           the rule
      space_to_depth               Token-Shuffle (95)           nothing                  n / s²  0           its inverse
      from_groups                  code subtokens (10),         given groups             c       n²          the rule
      bind, bind_attributes        negation (113), binding (3)  given groups             n       n²          the rule
    guidance
      nearest, negative_merge      NegToMe (43)                 a reference              n       n m         negtome

What carries weights (FcaFormer, TokenFLEX, Token-Shuffle, FlexDiT, CrossLMM, ARC-Encoder, Isomer, DyVTE's router, DiffRate's
rates) is in `models.reducers`; attention over tokens that were merged, as if they were not (DyMU, 22), in `jaxmerge.virtual`.
"""

from jaxmerge._rank import ranks as ranks
from jaxmerge.tokens._guide import negative_merge as negative_merge
from jaxmerge.tokens._nearest import Nearest as Nearest, nearest as nearest
from jaxmerge.tokens.clustering import (
    Weighted as Weighted,
    Windows as Windows,
    adaptive_k_means as adaptive_k_means,
    attention_and_density as attention_and_density,
    attention_and_similarity as attention_and_similarity,
    attention_inhibition as attention_inhibition,
    carry_positions as carry_positions,
    center_weight as center_weight,
    density_centers as density_centers,
    density_peaks as density_peaks,
    frame_similarity as frame_similarity,
    holitom as holitom,
    in_order as in_order,
    inertia as inertia,
    k_means as k_means,
    keep_apart as keep_apart,
    members as members,
    nearest_center as nearest_center,
    primary_and_clusters as primary_and_clusters,
    rope_positions as rope_positions,
    silhouette as silhouette,
    static_merging as static_merging,
    static_windows as static_windows,
)
from jaxmerge.tokens.given import (
    bind as bind,
    bind_attributes as bind_attributes,
    depth_to_space as depth_to_space,
    from_groups as from_groups,
    grid_pool as grid_pool,
    matryoshka_pool as matryoshka_pool,
    sequence_pool as sequence_pool,
    space_to_depth as space_to_depth,
    temporal_pairs as temporal_pairs,
)
from jaxmerge.tokens.matching import (
    LayerNorm as LayerNorm,
    MergeStep as MergeStep,
    RunningThreshold as RunningThreshold,
    adjacent_matching as adjacent_matching,
    bipartite_matching as bipartite_matching,
    block_matching as block_matching,
    clip_matching as clip_matching,
    earlier_matching as earlier_matching,
    energy as energy,
    energy_matching as energy_matching,
    grid_matching as grid_matching,
    halvings as halvings,
    head_mean as head_mean,
    in_rounds as in_rounds,
    keep_schedule as keep_schedule,
    kth_bipartite_matching as kth_bipartite_matching,
    local_matching as local_matching,
    margins as margins,
    matching_threshold as matching_threshold,
    merge_step as merge_step,
    random_bipartite_matching as random_bipartite_matching,
    schedule as schedule,
    threshold_matching as threshold_matching,
    trajectory_matching as trajectory_matching,
    two_sided_matching as two_sided_matching,
)
from jaxmerge.tokens.pruning import (
    Packed as Packed,
    assign as assign,
    dominant_and_contextual as dominant_and_contextual,
    exit_layer as exit_layer,
    exit_plan as exit_plan,
    flow_budget as flow_budget,
    flow_cut as flow_cut,
    flow_layers as flow_layers,
    flow_score as flow_score,
    hiprune as hiprune,
    keep as keep,
    keep_top_k as keep_top_k,
    linear_decay as linear_decay,
    local_outlier_factor as local_outlier_factor,
    merged_similarity as merged_similarity,
    pack as pack,
    page_rank as page_rank,
    page_rank_pruning as page_rank_pruning,
    prune_and_merge as prune_and_merge,
    recover as recover,
    redundant as redundant,
    representatives as representatives,
    sample_by_correlation as sample_by_correlation,
    visible_layers as visible_layers,
)
from jaxmerge.tokens.soft import (
    attention_score as attention_score,
    frame_attention as frame_attention,
    propagate as propagate,
    saliency_gather as saliency_gather,
    soft_gather as soft_gather,
    sparsify as sparsify,
    subgraph as subgraph,
    token_graph as token_graph,
    token_transform as token_transform,
)
