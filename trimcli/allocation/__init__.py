"""Layer allocation: how much of the target each decoder layer, or each linear, is to lose.

    uniform         everything gets the target
    owl             by the share of outliers among a decoder layer's scores (Yin et al. 2024)
    alpha           by the shape of each matrix's spectrum (Lu et al. 2024)
    ww_metrics      ten more shapes to allocate by, from weightwatcher
    imports         what the published tools saved
    settle          the last step of all of them: onto the target, exactly or as published
    metrics_cache   metrics kept between runs
    layer_sparsity  the result, and its file

`trimcli.stages.allocate` composes them into the command.
"""

from trimcli.allocation.layer_sparsity import LayerSparsity

__all__ = ["LayerSparsity"]
