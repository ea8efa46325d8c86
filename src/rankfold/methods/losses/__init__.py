"""Terms added to the user's loss, one file each: `@register("loss", name)` on a subclass of `training.contracts.Loss`.

A structure or a rank policy that needs a term of its own (orthogonality of factors) declares it in its `objectives`, not here.
"""
