"""From a recipe to verified releases: the one place that knows the order of the steps.

run            the three of them in a row
train          zero-shot -> for each task: train the pools, pack the selected experts, merge, evaluate
export         the graphs once -> for each release: weights, class embeddings, golden samples, manifest
verification   for each release: contents, parity, proof, latency -> reports
bundle         the factors that a device lacks, signed
"""
