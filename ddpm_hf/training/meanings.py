"""What other training programs call the flags that every script has: what to write here, and the names elsewhere."""

from ..common.arguments import synonyms

# Among them those of lucidrains' denoising-diffusion-pytorch, OpenAI's improved-diffusion and guided-diffusion,
# transformers' Trainer and Lightning
TRAINING = synonyms(
    """
--output_dir: output out out_dir outdir save_dir save_path results_folder results_dir output_path model_dir save_folder
--overwrite_output_dir: overwrite force replace
--seed: random_seed manual_seed
--config: cfg config_file config_path yaml args_file
--dry_run: dry check test_run

--train_batch_size: batch_size batch bs b train_bs train_batch per_device_train_batch_size batch_size_per_gpu
--eval_batch_size: eval_batch val_batch_size validation_batch_size per_device_eval_batch_size num_eval_images
--eval_batch_size: num_validation_images
--gradient_accumulation_steps: grad_accum accum gradient_accumulation gradient_accumulate_every accumulation_steps
--gradient_accumulation_steps: accumulate_grad_batches grad_accumulation_steps
--gradient_accumulation_steps with a smaller --train_batch_size: microbatch micro_batch_size
--dataloader_num_workers: workers num_workers dataloader_workers n_workers num_dataloader_workers
--num_epochs: epochs epoch num_epoch n_epochs max_epochs train_epochs n_epoch
--max_train_steps: steps step max_steps num_steps train_steps num_train_steps train_num_steps total_steps iters
--max_train_steps: iterations n_iter n_iters num_iters num_iterations max_iter max_iters training_steps
--max_train_steps: total_training_steps max_iterations total_iters
--max_train_steps with --lr_scheduler linear --lr_warmup_steps 0: lr_anneal_steps
--max_train_hours: hours max_hours time_limit max_time

--optimizer: optim optimizer_type opt optimizer_name
--optimizer muon: muon use_muon
--optimizer soap: soap use_soap
--optimizer schedulefree: schedule_free use_schedule_free schedulefree
--learning_rate: lr train_lr adam_lr base_lr max_lr
--adam_weight_decay: weight_decay wd
--adam_beta1 and --adam_beta2: betas adam_betas
--adam_beta1: beta1
--adam_beta2: beta2
--adam_epsilon: eps adam_eps epsilon
--lr_warmup_steps: warmup warmup_steps num_warmup_steps lr_warmup
--lr_scheduler: lr_schedule scheduler lr_scheduler_type lr_decay
--max_grad_norm: grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val grad_norm max_norm clip
--use_8bit_adam: 8bit_adam adam8bit use_8bit optim_8bit

--use_ema: ema with_ema enable_ema
--ema_snapshot_steps: post_hoc_ema karras_ema ema_snapshots snapshot_ema phema
--use_ema --ema_max_decay: ema_decay ema_rate ema_beta

--mixed_precision fp16: fp16 use_fp16 half amp use_amp float16
--mixed_precision bf16: bf16 use_bf16 bfloat16
--mixed_precision no: fp32 float32 full_precision
--mixed_precision: precision dtype torch_dtype mp
--allow_tf32: tf32 use_tf32
--compile: torch_compile compile_model use_compile
--gradient_checkpointing: grad_checkpointing grad_checkpoint use_checkpoint activation_checkpointing
--cpu_threads: threads num_threads
accelerate launch --num_processes N: gpus num_gpus n_gpus n_gpu ngpu devices num_processes nproc nproc_per_node
accelerate launch --num_processes N: world_size num_devices
accelerate launch --gpu_ids: gpu gpu_id gpu_ids device device_ids cuda
accelerate launch --cpu: cpu use_cpu no_cuda
accelerate launch --multi_gpu: multi_gpu distributed ddp

--resume_from_checkpoint latest: resume resume_training auto_resume
--resume_from_checkpoint: resume_from resume_checkpoint resume_path ckpt ckpt_path checkpoint load_checkpoint
--checkpointing_steps: save_interval save_steps save_every save_freq ckpt_interval ckpt_freq checkpoint_every
--checkpointing_steps: checkpoint_interval checkpoint_steps save_and_sample_every checkpoint_freq save_ckpt_freq
--checkpoints_total_limit: save_total_limit max_checkpoints keep_checkpoints total_limit keep_last

--save_model_epochs: save_epochs save_every_n_epochs
--validation_steps: eval_steps val_steps eval_interval eval_every val_interval val_every validation_interval
--logging_steps: log_interval log_every log_steps log_freq logging_interval print_every log_every_n_steps
--logger: tracker log_with log_to
--logger wandb: wandb use_wandb log_wandb
--logger tensorboard: tensorboard use_tensorboard
--tracker_project_name: project project_name wandb_project run_name experiment exp_name
--logging_dir: log_dir logdir tensorboard_dir
""".replace("\n\n", "\n")
)
# Flags that only trainings of pipelines have
GRIDS = synonyms("""
--save_images_steps: sample_interval sample_every sample_freq image_interval sample_steps preview_steps
--save_images_epochs: sample_epochs sample_every_n_epochs preview_epochs
--save_images_epochs 0: no_samples no_grids no_images no_previews no_sampling
""")
