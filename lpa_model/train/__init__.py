"""Training an LPA model from text, behind `lpa train` and `lpa tokenize`.

Data flows one way: `text` reads files piece by piece, `tokenizer` and `tokens` make token files of them, `data` cuts
windows out of those, `loss` and `optimizer` make a step of a window, `loop` repeats it, and `metrics` and `state` keep
what an interrupted run goes on from.
"""
