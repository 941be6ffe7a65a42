"""Images: sources, decoding, augmentation, loaders, calibration batches."""
