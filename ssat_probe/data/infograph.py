"""DomainNet infograph, 51,605 infographics of many sizes in 345 classes; list files and folders."""

from ssat_probe.domainnet import domain

Dataset = domain("infograph", num_train=36_023, num_test=15_582, archive="infograph.zip")
