"""Outlier exposure: training with auxiliary outliers (OE, energy margins, POEM, DOE, NTOM), with and without Unleashing
Mask."""
