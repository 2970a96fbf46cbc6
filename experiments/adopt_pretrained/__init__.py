"""Does a pretrained model take another attention?"""
