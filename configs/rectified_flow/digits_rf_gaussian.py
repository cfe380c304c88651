"""scikit-learn's handwritten digits (1,797 grey 8×8 images, no download): minutes on a laptop."""

from configs.default import get_default_config


def get_config():
    """Return the digits config: the 1-flow network of the demo, 748,737 parameters."""
    config = get_default_config()
    config.data.dataset = "digits"
    config.data.image_size = 8
    config.data.num_channels = 1
    config.data.random_flip = False  # a mirrored digit is no digit
    config.model.nf = 32
    config.model.ch_mult = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attn_resolutions = (4,)
    config.model.dropout = 0.0
    config.model.ema_rate = 0.999
    config.training.batch_size = 64
    config.training.n_iters = 1500
    config.training.snapshot_freq = 500
    config.training.snapshot_freq_for_preemption = 100
    config.training.snapshot_sampling = 500
    config.training.record_iters = 50
    config.optim.lr = 1e-3
    config.optim.warmup = 100
    config.sampling.ode_tol = 1e-3
    config.sampling.sample_N = 1
    config.sampling.batch_size = 256
    config.sampling.total_number_of_samples = 4000
    config.eval.batch_size = 500
    config.eval.num_samples = 2000
    config.eval.begin_ckpt = 1
    config.eval.end_ckpt = 0
    config.eval.feature_extractor = "pixels"
    return config
