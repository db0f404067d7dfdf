"""What a run leaves, in files that other tools load: `moedistill export`, and `formats` of the export stage."""
