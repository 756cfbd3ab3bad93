"""Low-rank factors for a dense model: `lpa convert llama SRC DST --keep 0.9`, and what belongs to it.

calibrate.py    a text through the model, layer by layer: second moments of what every matrix reads
gradients.py    a text forwards and back: what an error of each matrix's output costs
weigh.py        what it costs by the weights alone, and how the two are used
factor.py       one matrix: whitened, weighted, cut at a rank; its error curve
allocate.py     a rank for every matrix from one budget of parameters or cache bytes
convert.py      these together: a dense folder in, a folder of factors and a report out
kept.py         pairs and error curves of one text in a folder, for other budgets
text.py         the texts to calibrate and to measure on
repair.py       the factors trained towards the dense model
"""
