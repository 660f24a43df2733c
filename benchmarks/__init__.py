"""How kvzip's codecs compare to other compressors, and how fast a GPU decodes."""
