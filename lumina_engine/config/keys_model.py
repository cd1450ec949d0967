"""The keys that shape the model: sections `model` and `moe`."""

from __future__ import annotations

from typing import ClassVar, Literal

from lumina_engine.config.declare import Section, key

_MODEL = "model/transformer.py"
_ATTENTION = "model/attention.py"
_LATENT = "model/latent.py"
_MOE = "model/moe.py"


class ModelKeys(Section):
    """Shape and numerics of the transformer."""

    section_name: ClassVar[str] = "model"

    vocab_size: int | Literal["auto"] = key(
        "auto",
        "Embedding rows. auto takes the tokenizer's ids rounded up to 128 (100,352 for gpt-4, 1,024 for lumina-1k). "
        "Fewer rows than the tokenizer has ids is an error.",
        unit="ids",
        minimum=256,
        maximum=1_000_000,
        read_by="model/transformer.py, config/resolve.py",
    )
    hidden_size: int = key(
        512,
        "Width of the model. With head_dim auto it must be a multiple of num_heads.",
        minimum=64,
        maximum=65_536,
        read_by=_MODEL,
    )
    num_layers: int = key(8, "Transformer blocks.", unit="blocks", minimum=1, maximum=512, read_by=_MODEL)
    num_heads: int = key(8, "Query heads.", unit="heads", minimum=1, maximum=1_024, read_by=_ATTENTION)
    num_kv_heads: int = key(
        4,
        "Key and value heads; must divide num_heads. Equal to num_heads is full attention, 1 is multi-query. "
        "Fewer make the chat cache smaller.",
        unit="heads",
        minimum=1,
        maximum=1_024,
        read_by=_ATTENTION,
    )
    head_dim: int | Literal["auto"] = key(
        "auto", "Width of one head. auto is hidden_size / num_heads.", minimum=8, maximum=512, multiple_of=2, read_by=_ATTENTION
    )
    intermediate_size: int | Literal["auto"] = key(
        "auto",
        "Inner width of one expert, or of the dense feed-forward network. auto is 8/3 of hidden_size, up to the next 256.",
        minimum=8,
        maximum=262_144,
        multiple_of=8,
        read_by=_MOE,
    )
    seq_length: int = key(
        2_048,
        "Longest row in training and longest context in chat. Longer documents are cut so that the last answer survives.",
        unit="tokens",
        minimum=16,
        maximum=1_048_576,
        read_by="data/rows.py, model/transformer.py",
    )
    attention: Literal["gqa", "mla"] = key(
        "gqa", "Kind of attention: grouped-query, or multi-head latent with a compressed cache.", read_by=_ATTENTION
    )
    kv_lora_rank: int = key(
        512,
        "MLA: size of the latent from which keys and values are expanded; the chat cache keeps it.",
        minimum=1,
        read_by=_LATENT,
    )
    q_lora_rank: int | None = key(
        None,
        "MLA: size of the latent from which queries are expanded; null does not compress them.",
        minimum=1,
        read_by=_LATENT,
    )
    qk_nope_head_dim: int = key(128, "MLA: part of a head without rotary positions.", minimum=1, read_by=_LATENT)
    qk_rope_head_dim: int = key(64, "MLA: part of a head with rotary positions.", minimum=2, multiple_of=2, read_by=_LATENT)
    v_head_dim: int = key(128, "MLA: width of a value head.", minimum=1, read_by=_LATENT)
    sliding_window: int | None = key(
        None,
        "A token attends to itself and this many tokens minus one before it; null is the whole document.",
        unit="tokens",
        minimum=16,
        read_by=_ATTENTION,
    )
    qk_norm: bool = key(
        False,
        "RMSNorm on queries and keys of every head; steadies training at high learning rates. Not with attention mla.",
        read_by=_ATTENTION,
    )
    rope_theta: float = key(
        500_000.0,
        "Base of the rotary position embedding. Below 0.0424 x seq_length^1.628 far positions become ambiguous.",
        minimum=100,
        read_by="model/transformer.py",
    )
    rope_scaling: Literal["none", "linear", "yarn"] = key(
        "none",
        "How positions are stretched to reach beyond the length the weights were trained at.",
        read_by="model/transformer.py",
    )
    rope_scaling_factor: float = key(1.0, "Stretch factor of rope_scaling.", minimum=1, read_by="model/transformer.py")
    rope_original_length: int | None = key(
        None,
        "Length the weights were trained at before rope_scaling; null is seq_length / rope_scaling_factor.",
        unit="tokens",
        minimum=16,
        read_by="model/transformer.py",
    )
    norm_eps: float = key(1e-5, "Added under the root in RMSNorm.", above=0, read_by=_MODEL)
    init_std: float = key(
        0.02,
        "Standard deviation of the initial weights; output projections are scaled by 1/sqrt(2 x num_layers).",
        above=0,
        read_by=_MODEL,
    )
    tie_word_embeddings: bool = key(True, "The output head shares its weights with the embedding.", read_by=_MODEL)
    dropout: float = key(
        0.0, "Dropout on the residual branches in training.", minimum=0, maximum=0.9, resume=True, read_by=_MODEL
    )
    use_flash_attention: bool = key(
        True,
        "Fused attention (torch SDPA); false takes the plain reference, which holds all scores.",
        resume=True,
        read_by=_ATTENTION,
    )
    gradient_checkpointing: bool | Literal["selective"] = key(
        False,
        "Recompute blocks in the backward pass instead of keeping their activations: less memory, a third more compute. "
        "selective recomputes only cheap parts.",
        resume=True,
        read_by=_MODEL,
    )
    partition_activations: bool = key(
        False,
        "Split checkpointed activations over ranks. Changes nothing without tensor parallelism.",
        resume=True,
        read_by="config/deepspeed.py",
    )
    compile: bool = key(
        False, "Compile each block with torch.compile; the first step takes longer.", resume=True, read_by="training/trainer.py"
    )
    loss_chunk_size: int = key(
        2_048,
        "Rows of logits alive at once in the loss; 0 computes all at once. Smaller needs less memory.",
        unit="tokens",
        minimum=128,
        maximum=65_536,
        also=(0,),
        resume=True,
        read_by="model/transformer.py",
    )


class ExpertKeys(Section):
    """Mixture of experts."""

    section_name: ClassVar[str] = "moe"

    use_moe: bool = key(True, "Experts with a router; false is one dense feed-forward network per block.", read_by=_MODEL)
    num_experts: int = key(8, "Experts per block.", unit="experts", minimum=1, maximum=1_024, read_by=_MOE)
    moe_top_k: int = key(
        1,
        "Experts that each token uses, at most num_experts. 2 is Mixtral style: twice the expert compute per token.",
        unit="experts",
        minimum=1,
        maximum=1_024,
        read_by=_MOE,
    )
    num_shared_experts: int = key(
        0, "Experts that every token uses, beside the routed ones.", unit="experts", minimum=0, maximum=16, read_by=_MOE
    )
    num_dense_layers: int = key(
        0, "First blocks that are dense, at most num_layers.", unit="blocks", minimum=0, maximum=512, read_by=_MODEL
    )
    dense_intermediate_size: int | Literal["auto"] = key(
        "auto",
        "Inner width of the dense first blocks. auto is moe_top_k x intermediate_size.",
        minimum=8,
        maximum=4_194_304,
        multiple_of=8,
        read_by=_MODEL,
    )
    router_score: Literal["softmax", "sigmoid"] = key("softmax", "How the router turns logits into scores.", read_by=_MOE)
    router_normalize: bool | Literal["auto"] = key(
        "auto",
        "Divide the gates of the chosen experts by their sum. auto does it for moe_top_k of 2 and more; with 1 the gate would "
        "always be 1 and the router would never learn.",
        read_by=_MOE,
    )
    router_scale: float = key(1.0, "Factor on the gates.", above=0, read_by=_MOE)
    load_balancing_weight: float = key(
        0.01,
        "Weight of the balance loss, which is 1.0 when all experts get the same load. 0.02 when experts drift apart. With "
        "gradient accumulation the loads that a micro batch is judged by are those of its own and the earlier micro batches of "
        "the step, on all ranks; without it they are those of the global batch.",
        minimum=0,
        maximum=10,
        resume=True,
        read_by="training/trainer.py",
    )
    router_bias_rate: float = key(
        0.0,
        "Balancing without a loss: each step an expert's selection bias moves by this much against its load. 1e-3 is usual, "
        "0 is off.",
        unit="per step",
        minimum=0,
        maximum=0.1,
        resume=True,
        read_by="training/trainer.py",
    )
    router_z_loss_weight: float = key(
        0.001,
        "Weight of the mean squared logsumexp of the router's logits; keeps them small.",
        minimum=0,
        maximum=1,
        resume=True,
        read_by="training/trainer.py",
    )
    router_jitter_noise: float = key(
        0.0,
        "In training the router's input is multiplied by a random number from 1 - x to 1 + x. 0.01 is usual.",
        minimum=0,
        maximum=0.5,
        resume=True,
        read_by=_MOE,
    )
    capacity_factor: float = key(
        1.25,
        "Room of an expert in training, as a multiple of an equal share; tokens beyond it skip the expert. 2.0 when many "
        "are dropped.",
        minimum=0.1,
        maximum=64,
        resume=True,
        read_by=_MOE,
    )
    moe_dropless: bool = key(
        False, "No capacity in training either: no token is dropped. Evaluation and chat never drop.", resume=True, read_by=_MOE
    )
    expert_parallel_size: int = key(
        1,
        "Ranks over which the experts of a block are spread; must divide num_experts and the number of ranks.",
        unit="ranks",
        minimum=1,
        maximum=1_024,
        resume=True,
        read_by="training/expert_parallel.py",
    )
    overlap_alltoall: bool = key(
        False,
        "Send tokens to experts in two parts, one under way while the other computes.",
        resume=True,
        read_by="training/expert_parallel.py",
    )
