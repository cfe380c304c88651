"""scikit-learn's handwritten digits (1,797 grey 8×8 images, no download): minutes on a laptop."""

from configs.default import get_default_config


def get_config():
    """Return the digits config: the 1-flow network of the demo, 748,737 parameters."""
    config = get_default_config()
    config.data.update(dataset="digits", image_size=8, num_channels=1, random_flip=False)  # none is its mirror image
    config.model.update(nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, ema_rate=0.999)
    config.optim.update(lr=1e-3, warmup=100)
    config.training.update(batch_size=64, n_iters=1500, snapshot_freq=500, snapshot_freq_for_preemption=100,
                           snapshot_sampling=500, record_iters=50)
    config.sampling.update(ode_tol=1e-3, sample_N=1, batch_size=256, total_number_of_samples=4000)
    config.eval.update(batch_size=500, num_samples=2000, begin_ckpt=1, end_ckpt=0, feature_extractor="pixels")
    return config
