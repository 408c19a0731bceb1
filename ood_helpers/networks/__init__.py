"""The networks of an experiment: the backbone, those derived from it, and the registry of training methods.

To add a training method give its paper a folder in the package with `recipe.py` (options, `@RECIPES.register("mine")`),
`network.py` (`@NETWORKS.register("mine")`) and, where it has a score of its own, `detector.py`: modules of these names are
found. `mos/` is an example.
"""
