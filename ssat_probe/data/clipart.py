"""DomainNet clipart, 48,129 clip art of many sizes in 345 classes; list files and folders."""

from ssat_probe.domainnet import domain

Dataset = domain(
    "clipart",
    num_train=33_525,
    num_test=14_604,
    archive="groundtruth/clipart.zip (the cleaned version, which the lists are of)",
)
