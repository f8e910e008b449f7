"""Answer a deletion request: from rows to a model without them, and evidence of it.

    rows, model -> who saw them -> routes with prices -> stages of a study -> evidence

A route is *exact*, which trains again what saw the rows, without them, or *approximate*, which
unlearns them on top. The evidence is a folder that can be checked without the models.
"""
