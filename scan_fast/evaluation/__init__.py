"""Metrics against labels, probes of features, the label-free selection loss, and prototypes of clusters."""
