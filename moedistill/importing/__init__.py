"""Weights that were distilled elsewhere, as an export: `moedistill convert KIND SOURCE DEST --recipe RECIPE`."""
