"""A world of few words that a tiny model can learn on two CPU cores, and the judge of what the model makes of it.

scene.py says what there is and tells it in sentences, film.py makes pictures and sounds of it, judge.py finds out from pixels
and samples alone what is there, prompts.py has what a model is measured with. `show` and `validate` are commands.
"""
