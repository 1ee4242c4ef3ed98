"""Names that users bring from MedicalGPT, TRL, transformers and LLaMA-Factory, and what becomes of them."""

# Another name for the same thing.
ALIASES = {
    "num_train_epochs": "n_epochs",
    "num_epochs": "n_epochs",
    "epochs": "n_epochs",
    "global_batch_size": "batch_size",
    "effective_batch_size": "batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_batch_size": "micro_batch_size",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model_max_length": "max_length",
    "cutoff_len": "max_length",
    "lora_r": "lora_rank",
    "r": "lora_rank",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "torch_dtype": "dtype",
    "lr_scheduler": "lr_scheduler_type",
    "max_train_steps": "max_steps",
    "max_gradient_norm": "max_grad_norm",
    "reward_model_name_or_path": "reward_model",
    "reward_model_name": "reward_model",
    "num_ppo_epochs": "ppo_epochs",
    "response_length": "output_max_length",
    "max_completion_length": "output_max_length",
    "kl_coef": "init_kl_coef",
    "template": "chat_template",
    "template_name": "chat_template",
    "peft_path": "init_adapter",
}
# Flags that say a dtype when they are true.
DTYPE_FLAGS = {"fp16": "float16", "bf16": "bfloat16"}
# Accepted and without effect, because the service decides; the job echoes them with the reason.
IGNORED = {
    "output_dir": "every attempt has a folder of its own; the results are the job's artifacts",
    "overwrite_output_dir": "every attempt has a folder of its own",
    "logging_dir": "TensorBoard files are among the job's artifacts",
    "report_to": "TensorBoard files are always written",
    "device_map": "the model goes to the devices that the job holds",
    "do_train": "a job trains",
    "do_eval": "a job with validation rows evaluates",
    "save_strategy": "checkpoints are saved every save_steps steps",
    "logging_strategy": "metrics are logged every logging_steps steps",
    "eval_strategy": "validation rows are evaluated every eval_steps steps",
    "evaluation_strategy": "validation rows are evaluated every eval_steps steps",
    "logging_first_step": "the first step is always logged",
    "per_device_eval_batch_size": "evaluation uses micro_batch_size",
    "preprocessing_num_workers": "rows are tokenized once and cached",
    "ddp_timeout": "rows are tokenized before the processes start, so nothing waits that long",
    "ddp_find_unused_parameters": "no parameter is ever unused",
    "use_fast_tokenizer": "fast tokenizers are always used",
    "model_name_or_path": "it is the job's model",
    "tokenizer_name_or_path": "the tokenizer is the model's own",
    "dataset_name": "the data is the job's training file",
    "dataset_config_name": "the data is the job's training file",
    "train_file_dir": "it is the job's training file",
    "validation_file_dir": "it is the job's validation file",
}
# Fields of the job that the reference's command lines name among the rest.
JOB_FIELDS = ("seed", "nproc_per_node")
# Known names that have no equivalent here, with what to do instead.
REFUSED = {
    "resume_from_checkpoint": "a job goes on from its last checkpoint by itself, also after a pause; "
    "to start another one from the weights of an adapter, name it in init_adapter",
}
