"""Golden nearest neighbours."""

_base_ = "classify.py"

protocol = "knn"
data = {"train": "scenes:300@32,seed=3"}
knn = {"ks": [1, 5, 20]}
