"""Model organisms: small models with one known behaviour in one known place, to test against what is true.

`embedded` knows those that ship with the package; `python -m gtqlora.organisms build` makes new ones.
"""
