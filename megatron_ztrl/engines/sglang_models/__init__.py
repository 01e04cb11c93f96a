"""What ``SGLANG_EXTERNAL_MODEL_PACKAGE`` names: SGLang's own classes of the models that this project trains.

A server that finds its model in that package need not import its 240 others, which saves a quarter of its start on a
CPU. For any other model it imports them all, as it would without.
"""
