"""Pictures made ready for training: resized, cropped, captioned, tagged."""
