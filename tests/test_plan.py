import jax, jax.numpy as jnp, jaxmerge as jm
def test_a():
    plan = jm.Plan(jnp.array([0, 0, 1, -1]), 2)
    y = jax.jit(lambda p, x: jm.merge(p, x))(plan, jnp.ones((4, 3)))
    assert y.shape == (2, 3)
    jax.vmap(lambda p: p.sizes)(jm.Plan(jnp.zeros((3,4),int),2))
    jax.tree.map(lambda a: object(), plan)
    jm.merge(plan, [jnp.ones((4,)), jnp.ones((4,2,2), jnp.bfloat16)], weight=jnp.ones(4))
