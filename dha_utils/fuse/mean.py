"""Mean pooling: the weights of a group averaged, as in GQA (Ainslie et al. 2023, §2.1)."""

from ..measure.energies import share
from ..measure.moments import with_bias


def mean_head(projection, group, head_dim):
    """[d, n]: the mean of the projection's heads in `group`."""
    return with_bias(projection).float().unflatten(0, (-1, head_dim))[group].mean(0)


def mean_cost(attention):
    """The same two functions for mean pooling, judged by the weights alone: the share of their variance within groups."""

    def within_groups(projection):
        heads = with_bias(projection).detach().float().unflatten(0, (-1, attention.head_dim))
        total = float(heads.square().sum())
        return lambda group: share(float((heads[list(group)] - heads[list(group)].mean(0)).square().sum()), total)

    return within_groups(attention.k_proj), within_groups(attention.v_proj)
