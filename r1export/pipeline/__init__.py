"""From a recipe to verified releases: this package defines the order of the steps.

run            train, export and verify
train          zero-shot -> for each task: train the pools, pack the selected experts, merge, evaluate
export         the graphs once -> for each release: weights, class embeddings, golden samples, manifest
verification   for each release: contents, parity, proof, latency -> reports
bundle         signed updates for devices
"""
