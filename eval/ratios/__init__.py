"""The protocol of published lossless codecs: learn on one split of a text, measure on the other."""
