"""DomainNet sketch, 69,128 sketches of many sizes in 345 classes; list files and folders."""

from ssat_probe.domainnet import domain

Dataset = domain("sketch", num_train=48_212, num_test=20_916, archive="sketch.zip")
