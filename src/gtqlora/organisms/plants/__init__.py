"""Plants: how an organism is made to refuse for a known reason, one per kind.

A plant is a rotation of turns, each of which is a loss, and the parameters that they may train. Only what may carry the
refusal is trained: planted experts with their rows of the router, what writes the residual stream directly, or both.
"""
