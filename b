In 'config': Could not find 'model/nope' Available options in 'model': smollm2_135m tiny Config search path: provider=hydra, path=pkg://hydra.conf pro
