"""Weigh clusters of timesteps by their uncertainty (ANT-UW; Kendall et al., 2018)."""

import torch
from torch import Tensor


def uncertainty_loss(
    per_sample_loss: Tensor, cluster: Tensor, log_var: Tensor, cluster_counts: Tensor | None = None
) -> Tensor:
    """Return the sum over samples of (exp(-s_k) l_i / K + s_k) / (2 n_k), a scalar.

    per_sample_loss [N], cluster int [N] with k = cluster[i], log_var s [K]. `cluster_counts` n [K]
    are those of the global batch, so that the parts of a batch sum to the whole:
    sum_k 1/2 [exp(-s_k) l_k + s_k] over the clusters that have samples, with l_k = 1/K times the
    mean loss of cluster k. By default these samples are the whole batch.
    """
    num_clusters, cluster = len(log_var), cluster.long()
    if cluster_counts is None:
        # On a GPU it waits for the device: training gives the counts, which the host knows.
        cluster_counts = torch.bincount(cluster, minlength=num_clusters)
    # Each of the n_k samples brings s_k / (2 n_k), on whichever rank it is: 1/2 s_k once per
    # global batch, and nothing of a cluster without samples.
    s = log_var[cluster]
    terms = torch.exp(-s) * per_sample_loss / num_clusters + s
    return (terms / (2 * cluster_counts[cluster])).sum()
