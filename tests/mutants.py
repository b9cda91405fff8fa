"""Small faults planted one at a time in a copy of the code: does a test notice? By hand, about fifteen minutes.

    python tests/mutants.py                    all of them; the last line is JSON
    python tests/mutants.py --only "epoch"     those whose description holds this text
    python tests/mutants.py --check            only whether each still applies, and its tests exist

Exit code 1: a fault survived, or no longer applies. mutmut and cosmic-ray change every operator and number,
some 6,000 here, which at ten seconds for the cheapest test of a training takes most of a day; these are faults that a
person would make.
"""

import argparse
import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOT_PRODUCT = ("tests", "benchmarks", "examples", "sample_data")
SECONDS = 300  # for a test that a fault has made endless


class Mutant(NamedTuple):
    """A fault: in `function`, `old` (an expression or a statement, in any formatting) becomes `new`."""

    fault: str
    """What a user would suffer."""
    function: str
    """Its qualified name, in whichever file it is; "file.py:name" where several have one, "file.py:" for module level."""
    old: str
    new: str
    tests: str
    """Names of the tests that should notice, in whichever files they are; [id] chooses of a parametrized one."""


# fmt: off
MUTANTS = [
    # ---- The loop
    Mutant("the loss is divided by the targets of one micro-batch",
           "train.py:main", "sum(count_targets(batch) for batch in micro_batches)",
           "count_targets(micro_batches[0]) * plan.accumulation",
           "test_every_split_of_the_global_batch_gives_the_reference_losses"),
    Mutant("gradients shrink with accumulation",
           "train.py:main", "plan.num_processes / num_targets.clamp(min=1)",
           "plan.num_processes / num_targets.clamp(min=1) / plan.accumulation",
           "test_every_split_of_the_global_batch_gives_the_reference_losses"),
    Mutant("gradients are never clipped",
           "train.py:main", "config.optimizer.max_grad_norm or math.inf", "math.inf",
           "test_every_split_of_the_global_batch_gives_the_reference_losses"),
    Mutant("the gradient norm grows with the number of processes",
           "Run.vote", "full_tensor(norm) / self.accelerator.num_processes", "full_tensor(norm)",
           "test_every_split_of_the_global_batch_gives_the_reference_losses"),
    Mutant("each rank votes for itself",
           "StopRequests.vote", 'self.accelerator.reduce(values, "sum").tolist()', "values.tolist()",
           "test_every_split_of_the_global_batch_gives_the_reference_losses"),
    Mutant("the gradients of a skipped update go into the next one",
           "train.py:main", "optimizer.zero_grad()", "optimizer.zero_grad() if fault is None else None",
           "test_17_a_loss_that_is_not_finite[math.nan-2]"),
    Mutant("a skipped update consumes the schedule",
           "Run.skip", "check_limits(state, self.config.guards, fault)",
           "(check_limits(state, config.guards, fault), scheduler.step())",
           "test_17_a_loss_that_is_not_finite[math.nan-2]"),
    Mutant("a skipped update does not consume its data",
           "train.py:main", "state.samples_seen += plan.global_batch_size",
           "state.samples_seen += plan.global_batch_size if fault is None else 0",
           "test_17_a_loss_that_is_not_finite[math.nan-2]"),
    Mutant("dropout hides the same in every step",
           "step_seed", "[seed, samples_seen, rank]", "[seed, 0, rank]",
           "test_each_step_and_rank_has_its_own_random_numbers"),
    Mutant("the best checkpoint is the worst",
           "_is_lower", "loss < (math.inf if best is None or math.isnan(best) else best)",
           "loss > (-math.inf if best is None else best)",
           "test_early_stopping_stops_after_patience_evaluations"),
    Mutant("patience ignores min_delta",
           "update_best", "state.patience_loss - config.early_stopping_min_delta", "state.patience_loss",
           "test_early_stopping_stops_after_patience_evaluations"),
    Mutant("early stopping follows the trained weights only",
           "update_best", 'config.early_stopping_weights == "average"', "False",
           "test_early_stopping_can_follow_the_average"),
    Mutant("a step is evaluated before it is saved",
           "train.py:main",
           "state.evaluation_due and step > run.saved_step and due(step, config.checkpoint.every_steps, max_steps)", "False",
           "test_a_checkpoint_is_whole_before_the_evaluation_of_its_step"),
    Mutant("an evaluation that fails loses the steps since the last checkpoint",
           "Run.looking", "save(wait=False)", "None",
           "test_an_evaluation_that_fails_costs_no_step[no_save_is_due]"),
    Mutant("a failing sample ends the run",
           "RunTracker.sample", "PEER_GONE.search(str(error))", "True",
           "test_a_sample_that_fails_is_a_warning"),
    Mutant("a first evaluation that is not finite stays the best",
           "_is_lower", "loss < (math.inf if best is None or math.isnan(best) else best)",
           "best is None or loss < best",
           "test_an_evaluation_that_is_not_finite_is_never_the_best_and_is_null_in_the_files"),
    Mutant("a batch without a target is a step",
           "check_update", "targets == 0", "targets < 0",
           "test_a_batch_without_a_target_makes_no_update[1]"),
    Mutant("the logged loss is the last step's",
           "Run.log_step", "state.interval_nats += loss * targets",
           "state.interval_nats = loss * (state.interval_targets + targets)",
           "test_the_logged_loss_is_the_mean_over_the_targets_of_its_interval"),
    Mutant("the speed after a resume counts the compilation",
           "Run.log_step", "self._warm == now", "True",
           "test_the_speed_leaves_out_the_first_step_of_a_launch"),
    # ---- Loss and evaluation
    Mutant("the chunked head leaves out an encoder's masks",
           "Objective.forward", "backbone(**inputs)", "backbone(**{**inputs, 'attention_mask': None})",
           "test_the_loss_of_packed_documents_is_that_of_each_alone_with_every_kernel[masked-eurobert] "
           "test_evaluate_py_scores_packed_rows_as_the_run_did[eurobert]"),
    Mutant("a model that reads what it must predict is trained",
           "check_future_is_hidden", "float(gradient[-1]) <= 1e-3 * float(gradient.max())", "True",
           "test_an_architecture_makes_steps_or_is_refused_in_one_line[causal-xlnet-packed]"),
    Mutant("label smoothing is in the evaluation, too",
           "Objective.forward", "self.config.label_smoothing if self.training else 0.0", "self.config.label_smoothing",
           "test_label_smoothing_is_the_trainers_and_z_loss_its_formula_in_training_only"),
    Mutant("the chunked head ignores the z-loss",
           "Objective.forward", "head_loss(hidden, head, targets, label_smoothing=smoothing, z_loss=z_loss, backend=self.head_backend)",
           "head_loss(hidden, head, targets, label_smoothing=smoothing, z_loss=0.0, backend=self.head_backend)",
           "test_the_objectives_loss_and_gradients_are_those_of_the_plain_one"),
    Mutant("the chunked head's z-loss has half its gradient",
           "_score", "1 + 2 * z_loss * log_normaliser", "1 + z_loss * log_normaliser",
           "test_the_chunked_head_has_the_loss_and_the_gradients_of_all_logits"),
    Mutant("dropout stays on in evaluations",
           "evaluating", "module.eval()", "module.train()",
           "test_an_evaluation_is_without_dropout"),
    Mutant("an evaluation counts the rows that fill up its last batch",
           "EvaluationBatchSampler.__iter__", "[PADDING_SAMPLE] * (self.batch_size - len(batch))",
           "batch[-1:] * (self.batch_size - len(batch))",
           "test_evaluation_covers_every_sample_once"),
    Mutant("bits per byte are nats per byte",
           "Evaluation.bits_per_byte", "self.loss * self.num_tokens / math.log(2) / num_bytes",
           "self.loss * self.num_tokens / num_bytes",
           "test_20_an_uneven_last_evaluation_batch"),
    Mutant("of a long prompt the beginning is read",
           "generate_text", "ids[1 - positions :]", "ids[: positions - 1]",
           "test_of_a_long_prompt_the_end_counts"),
    Mutant("a scored text file ends without eos",
           "encode_documents", "len(found) <= 1 or found[-1] != tokenizer.eos_token_id", "len(found) <= 1",
           "test_a_text_file_is_encoded_as_a_document_of_a_dataset"),
    Mutant("compared: a token is scored in two windows",
           "PaddedLayout.__getitems__", "columns >= length - self.stride", "columns >= length - self.stride - 1",
           "test_windows_score_each_token_once_with_context"),
    Mutant("compared: the worse model is the better one",
           "Difference.verdict", "self.interval.low > 0", "self.interval.low < 0",
           "test_better_worse_and_cannot_tell"),
    Mutant("compared: some models do not predict a text's first token",
           "encode", "tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id", "None",
           "test_models_with_other_tokenizers_read_the_same_text"),
    Mutant("compared: intervals are too narrow",
           "percentiles", "100 * (1 - CONFIDENCE) / 2", "100 * (1 - CONFIDENCE) * 3",
           "test_intervals_cover_the_truth"),
    Mutant("compared: each rank reports its own rows",
           "score_units", "gather_object([(sums, counts)])", "[(sums, counts)]",
           "test_results_do_not_depend_on_the_number_of_processes"),
    Mutant("compared: a source gets another one's documents",
           "find_sources", "np.arange(end - counts[name], end)", "np.arange(counts[name])",
           "test_each_source_has_its_figures"),
    Mutant("a bound holds for every number",
           "cli.py:find_problems", "COMPARISONS[sign](value, float(limit))", "True",
           "test_mistakes_on_the_command_line"),
    # ---- Rows
    Mutant("a token is its own target",
           "PackedLayout._batch", "buffer[:, 1:].astype(np.int64)", "buffer[:, :-1].astype(np.int64)",
           "test_every_target_is_scored_once"),
    Mutant("positions go on from one document to the next",
           "PackedLayout._batch", "np.concatenate([np.arange(len(labels) + 1) * length, ends])",
           "np.arange(len(labels) + 1) * length",
           "test_packed_positions_restart_with_each_document_and_row"),
    Mutant("the loss mask stands one token early",
           "PackedLayout._batch", "self.tokens.loss_mask.gather(starts, stops).reshape(-1, length + 1)[:, 1:]",
           "self.tokens.loss_mask.gather(starts, stops).reshape(-1, length + 1)[:, :-1]",
           "test_the_loss_mask_stands_at_its_tokens_target"),
    Mutant("best-fit drops documents that fill a row",
           "BestFitLayout.__getitems__", "(stop - start - 1) % length + 1", "(stop - start) % length",
           "test_every_target_is_scored_once"),
    Mutant("a padded row that is full loses its last target",
           "PaddedLayout.__getitems__", "np.minimum(offsets[documents + 1] - starts, length + 1)",
           "np.minimum(offsets[documents + 1] - starts, length)",
           "test_every_target_is_scored_once"),
    Mutant("a stream loses the target where a row cuts a document",
           "iter_rows", "document.input_ids[token + 1 : stop + 1]", "document.input_ids[token + 1 : stop]",
           "test_a_row_holds_what_a_plain_reading_gives"),
    Mutant("a resumed stream repeats the document that a row has cut",
           "iter_rows", '{**document.here, "token": token}', '{**document.here, "token": 0}',
           "test_a_resumed_stream_goes_on_as_if_it_had_not_stopped"),
    # ---- Order
    Mutant("the permutation leaves its range",
           "permute", "values >= np.uint64(size)", "values > np.uint64(size)",
           "test_permutation_is_one_and_changes_with_seed_and_epoch"),
    Mutant("every epoch has the order of the first",
           "sample_ids", "permute(positions[inside] % num_samples, num_samples, seed, int(epoch))",
           "permute(positions[inside] % num_samples, num_samples, seed, 0)",
           "test_sample_order_is_the_golden_one"),
    Mutant("every epoch hides the same tokens of a row",
           "TrainBatchSampler.__iter__",
           "epochs * self.num_samples + sample_ids(start, ahead, self.num_samples, self.seed)",
           "sample_ids(start, ahead, self.num_samples, self.seed)",
           "test_order_is_a_function_of_the_position"),
    Mutant("what is hidden depends on a row's place in its batch",
           "RowGenerators.__getitem__", "[self.seed, self.draws[index] + 1]", "[self.seed, index]",
           "test_what_is_hidden_depends_on_row_epoch_and_seed_alone"),
    # ---- Optimizer and schedule
    Mutant("the warm-up is a step ahead",
           "learning_rate_factor.factor", "step / warmup", "(step + 1) / warmup",
           "test_schedules_equal_transformers_at_every_step"),
    Mutant("norm weights decay",
           "split_by_decay", "parameter.ndim >= 2 and not is_norm(module) and not is_bias", "not is_bias",
           "test_decay_and_muon_go_by_the_kind_of_a_parameter"),
    Mutant("the moving average moves by its decay",
           "WeightAverage.update", "1 - decay", "decay",
           "test_the_average_equals_torchs_averaged_model_with_the_same_decay"),
    Mutant("an epoch ends a step early",
           "resolve_max_steps", "math.ceil(config.num_epochs * num_rows / global_batch_size)",
           "int(config.num_epochs * num_rows / global_batch_size)",
           "test_the_horizon_is_given_in_steps_epochs_or_positions"),
    Mutant("on slow CPUs Muon's steps have another size",
           "Muon.step", "max(parameter.shape)", "min(parameter.shape)",
           "test_where_bf16_is_slow_muon_computes_the_same_update_in_fp32"),
    Mutant("a spike widens the window that it is judged by",
           "guards.py:check_update", "state.spikes += 1",
           "state.spikes += 1; state.recent = [*state.recent, [loss, grad_norm]]",
           "test_19_the_rule_is_the_stated_one"),
    # ---- Checkpoints
    Mutant("a resumed run repeats a batch",
           "build_train_loader", "TrainBatchSampler(len(layout), batch_size, seed, samples_seen)",
           "TrainBatchSampler(len(layout), batch_size, seed, max(0, samples_seen - batch_size))",
           "test_damage[07_one_flipped_bit]"),
    Mutant("a resumed run has lost the optimizer's state",
           "load_training_state", 'optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})',
           "pass",
           "test_damage[07_one_flipped_bit]"),
    Mutant("a resumed schedule counts samples",
           "load_training_state", 'int(record["state"]["optimizer_step"])', 'int(record["state"]["samples_seen"])',
           "test_a_run_that_goes_further_follows_its_new_schedule_at_once"),
    Mutant("training goes on in what is being written",
           "CheckpointWriter._copy", "buffer.copy_(tensor, non_blocking=True)", "tensor",
           "test_a_checkpoint_is_of_its_moment_whatever_is_trained_while_it_is_written"),
    Mutant("a checkpoint appears file by file",
           "new_folder", "temporary.rename(target)", "shutil.copytree(temporary, target)",
           "test_a_checkpoint_is_whole_or_not_there"),
    Mutant("files are not compared with their hashes",
           "find_problem", "hash_file(path) != digest", "False",
           "test_damage[07_one_flipped_bit]"),
    Mutant("one damaged checkpoint loses the run",
           "find_newest_valid", "reversed(list_checkpoints(folder))", "list_checkpoints(folder)[-1:]",
           "test_damage[07_one_flipped_bit]"),
    Mutant("the best checkpoint is rotated away",
           "remove_old_checkpoints", "read_pointers(folder).values()", "()",
           "test_old_checkpoints_go_and_the_best_stays"),
    Mutant("the best average's checkpoint is rotated away",
           "CheckpointWriter.save", "state.best_average_step", "None",
           "test_the_average_has_a_best_checkpoint_of_its_own"),
    Mutant("links count for more than the file of pointers",
           "read_pointers", "path.is_file()", "False",
           "test_the_file_counts_then_the_links_then_the_state"),
    Mutant("a disk is not tried before the first step",
           "Run.begin", "try_disk(checkpoints)", "[]",
           "test_a_disk_that_cannot_hold_a_checkpoint_is_refused_before_the_first_step[fsync]"),
    Mutant("of a run the last checkpoint is taken in place of the best",
           "find_checkpoint", '("best", "last")', '("last",)',
           "test_old_checkpoints_go_and_the_best_stays"),
    # ---- Objectives
    Mutant("the middle is filled in before the suffix is known",
           "fill_in_the_middle.py:arrange", "[(before, one), prefix, (behind, one), suffix, (fill, one), middle, (eos, one)]",
           "[(before, one), prefix, (fill, one), middle, (behind, one), suffix, (eos, one)]",
           "test_the_rearranged_pieces_make_up_the_text"),
    Mutant("T5's sentinels stand behind their spans",
           "SpanCorruption.corrupt", "np.insert(text[is_noise], noise.cumsum() - noise, sentinels)",
           "np.insert(text[is_noise], noise.cumsum(), sentinels)",
           "test_spans_and_input_make_up_the_text"),
    Mutant("no hidden token becomes a random one",
           "Masking.__call__", "self.config.replace_rate + self.config.random_rate", "self.config.random_rate",
           "test_masking_hides_the_share_and_in_the_ways_that_transformers_does"),
    Mutant("what the user says behind an answer is learnt",
           "ConversationEncoder.encode_table", "(first < stop) & (after > start)", "after > start",
           "test_ids_and_mask_of_a_marked_template_are_transformers_own"),
    # ---- Text
    Mutant("no document ends with eos",
           "Encoder._frame", "chosen[:, -1] = lacks_eos", "chosen[:, -1] = False",
           "test_document_ids_are_the_tokenizers_own_and_eos"),
    Mutant("copies in capitals are kept",
           "digest", "normalize(text)", "text.strip()",
           "test_texts_that_say_the_same_are_equal"),
    Mutant("near duplicates are looked for in one band only",
           "_SignatureTable.band_keys",
           "block[candidates[offset : offset + len(block)], band * ROWS : (band + 1) * ROWS]",
           "block[candidates[offset : offset + len(block)], :ROWS]",
           "test_five_percent_of_the_words_edited_are_found"),
    Mutant("whatever meets in a band is a near duplicate",
           "find_near_duplicates", "table.are_alike(members[left], members[right], threshold)",
           "table.are_alike(members[left], members[right], 0)",
           "test_what_is_less_alike_than_the_threshold_is_kept"),
    Mutant("n-grams have a word too few",
           "hash_ngrams", "range(1, n)", "range(1, n - 1)",
           "test_ngrams_are_those_of_plain_python"),
    Mutant("a long page may quote a whole test item",
           "find_contaminated", "shared / index.sizes[owners]", "shared / counts[rows[0, 0]]",
           "test_a_text_that_holds_a_whole_evaluation_document_is_found"),
    Mutant("a picture stands in both splits", "select_documents", "is_held_out(held_out_by, validation_fraction)",
           "is_held_out(digests, validation_fraction)",
           "test_duplicates_are_equal_in_text_and_picture_and_a_picture_has_one_split"),
    Mutant("pictures with like captions are dropped", "select_documents", "(code == 0) & text_only", "(code == 0)",
           "test_duplicates_are_equal_in_text_and_picture_and_a_picture_has_one_split"),
    Mutant("pictures with the same caption are dropped", "sketch_table",
           "columns[name][row] = np.frombuffer(both, np.uint8)", "pass",
           "test_duplicates_are_equal_in_text_and_picture_and_a_picture_has_one_split"),
    Mutant("a record reads any file of the machine", "resolve", "not inside", "False",
           "test_files_that_cannot_be_used_are_named_and_the_others_stay_as_they_are[image_column-bad0-good0]"),
    Mutant("a model learns to write the placeholder of a picture",
           "Captioning.__call__", 'np.where(rows["targets"] == self.placeholder_id, IGNORED, rows["targets"])',
           'rows["targets"]', "test_a_target_is_the_next_token_and_never_a_picture[llava]"),
    Mutant("the text after a picture is predicted before the model has seen all of it",
           "Captioning.splice", "spread[sizes.cumsum() - 1] = targets", "spread[sizes.cumsum() - sizes] = targets",
           "test_the_loss_of_a_batch_is_what_the_model_says_of_each_text_by_itself[llava]"),
    Mutant("sinusoids are trained after a resume",
           "load_model", "parameter.requires_grad_(other.requires_grad)", "pass",
           "test_a_run_repeats_itself_exports_and_answers_as_transformers_pipeline[whisper]"),
    Mutant("a sound is read at another speed",
           "Transcription.decode", "rate != self.rate", "rate < 0",
           "test_what_the_models_read_is_rgb_the_right_side_up_and_one_channel_at_their_rate"),
    Mutant("a frozen module is trained",
           "set_up_training", "module.requires_grad_(False)", "pass",
           "test_frozen_modules_stay_and_modules_may_have_their_own_learning_rate"),
    Mutant("a changed picture goes unnoticed", "find_media", "found._replace(left=left, media=sorted(paths))",
           "found._replace(left=left)",
           "test_a_changed_picture_means_a_new_output_and_an_equal_one_none"),
    Mutant("pictures stand behind the text", "put_marks", "text.replace(head, head + MARK * pictures, 1)",
           "text + MARK * pictures", "test_placeholders_stand_where_the_pictures_do test_conversations_with_pictures"),
    Mutant("a picture loses its place", "clean_table", "text.count(MARK) != batch['text'][row].as_py().count(MARK)",
           "False", "test_cleaning_that_removes_a_mark_drops_the_document"),
    Mutant("pictures and texts are out of step", "write_media", "tables[indices[start:stop]]",
           "tables[np.sort(indices)[::-1][start:stop]]", "test_a_folder_of_pictures_or_sounds_with_its_metadata"),
    Mutant("half a sound is trained on", "seconds_of", "data[:4] == b'RIFF'", "False",
           "test_files_that_cannot_be_used_are_named_and_the_others_stay_as_they_are[audio_column-bad1-good1]"),
    Mutant("all pictures are in memory at once", "load_all", "len(waiting) > THREADS", "len(waiting) > 10000",
           "test_the_order_is_that_of_the_records_and_few_are_held"),
    Mutant("added documents move others across the split",
           "is_held_out", "_as_uint64(digests[:, :8]) < math.ceil(validation_fraction * 2**64)",
           "np.arange(len(digests)) < validation_fraction * len(digests)",
           "test_the_split_is_stable_when_documents_are_added"),
    Mutant("the other languages are kept",
           "language", 'best["lang"] not in languages', 'best["lang"] in languages',
           "test_languages_are_recognised"),
    Mutant("Gopher's shortest document is dropped",
           "gopher_quality", "len(words) < 50", "len(words) <= 50",
           "test_filters_and_their_borders"),
    Mutant("Gopher overlooks n-grams that stand twice",
           "_check_ngrams", "counts[ngram_ids] > 1", "counts[ngram_ids] > 2",
           "test_the_ngram_rules_agree_with_a_plain_loop"),
    Mutant("addresses with two short numbers are not masked",
           "_mask_address", "single_digits >= 3", "single_digits >= 2",
           "test_personal_data_is_masked_and_other_numbers_are_not"),
    # ---- Export
    Mutant("an export is compared with itself",
           "export.py:main", "auto_model.from_pretrained(work).eval()", "merged",
           "test_an_export_that_differs_is_not_written"),
    Mutant("merged adapters are compared with themselves",
           "export.py:main", "copy.deepcopy(merged).merge_and_unload()", "merged.merge_and_unload()",
           "test_adapters_train_alone_are_saved_resumed_and_merged_on_export"),
    Mutant("adapters are scaled by another alpha",
           "add_adapters", "config.alpha", "config.rank",
           "test_adapters_have_the_scale_that_is_asked_for"),
    Mutant("the average is exported as the last weights",
           "export.py:main", "load_average(checkpoint, model)", "pass",
           "test_a_run_is_the_same_split_or_resumed_and_opens_as_the_class_of_its_objective[gpt2_124m]"),
    Mutant("a private export is pushed to a public repository",
           "push", "is_private or not private", "True",
           "test_a_private_push_leaves_a_public_repository_alone"),
    Mutant("another export than the one that was asked for is pushed",
           "find_changes", "found[name] != value", "False",
           "test_an_existing_folder_is_pushed_only_if_it_is_this_export"),
    Mutant("embedding and head are not tied",
           "build_architecture", "config.tie_word_embeddings", "False",
           "test_every_split_of_the_global_batch_gives_the_reference_losses"),
    # ---- Figures and hints
    Mutant("an A100 is taken for a tenth of itself",
           "hardware.py:", "312e12", "31.2e12",
           "test_the_peaks_of_the_cards_are_what_their_processors_can_do"),
    Mutant("the dry run evaluates without weights",
           "dry_run_report", 'evaluation += sum(memory.values()) - memory["gradients"] - memory["activations"]', "pass",
           "test_the_evaluations_memory_in_a_dry_run_is_that_of_a_real_one"),
    Mutant("checkpoints are not flushed to the disk",
           "_flush_to_disk", "os.fsync(descriptor)", "None",
           "test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_has_it_before_another_goes"),
    Mutant("loss.png lacks the evaluations",
           "draw_losses", "curves.get(*COLOURS)", 'curves.get("train/loss")',
           "test_the_plot_shows_the_losses_and_the_learning_rate"),
    Mutant("the speed is ten times too high",
           "Run.log_step", "(state.tokens_seen - tokens) / (state.train_seconds - seconds)",
           "10 * (state.tokens_seen - tokens) / (state.train_seconds - seconds)",
           "test_the_speed_is_tokens_over_the_seconds_that_they_took"),
    Mutant("samples ignore the temperature",
           "generate_text", "temperature or None", "None",
           "test_texts_are_drawn_at_their_temperature"),
    Mutant("all ranks draw the same dropout",
           "train.py:main", "step_seed(config.seed, state.samples_seen, accelerator.process_index)",
           "step_seed(config.seed, state.samples_seen, 0)",
           "test_ranks_draw_their_own_dropout"),
    Mutant("no CPU has fast bf16",
           "fast_bf16", 'any(present for name, present in cpu_capabilities().items() if "bf16" in name)', "False",
           "test_whether_bf16_is_fast_is_what_the_processor_says"),
    # ---- Web pages and control characters
    Mutant("prose that stands beside a list of links goes with it",
           "_Element.is_navigation", "self.links >= 2 and share >= most", "self.links >= 2",
           "test_prose_and_its_lists_stay_wherever_they_stand"),
    Mutant("a self-closed title contains the page",
           "html.py:_closes_itself", "attributes[-1:] in ('', *'\"\\' \\t\\r\\n')", "False",
           "test_prose_and_its_lists_stay_wherever_they_stand"),
    Mutant("form feeds join the words of two pages",
           "remove_controls", "PARAGRAPH_ENDS.sub('\\n\\n', LINE_SEPARATORS.sub('\\n', unify_line_ends(text)))",
           "LINE_SEPARATORS.sub('\\n', unify_line_ends(text))", "test_controls_become_what_they_mean"),
    Mutant("a run of marks takes time that grows with its square",
           "_iter_long_runs", "end - start > MAX_MARKS", "False", "test_time_grows_with_the_text_whatever_it_repeats"),
]
# fmt: on


class DoesNotApply(Exception):
    """The code or the tests have moved on; the row of the table must follow."""


def product_files() -> list[Path]:
    """What git has of the checkout, and what is new in it, as it lies there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in sorted(set(names)) if name and (ROOT / name).is_file()]


@functools.cache
def functions(in_tests: bool) -> list[tuple[str, Path, ast.AST]]:
    """(qualified name, file, node) of every function and class of the product, or of the tests, nested ones too; and
    of every file as a whole, whose name is empty."""
    found: list[tuple[str, Path, ast.AST]] = []

    def visit(node: ast.AST, prefix: str, path: Path) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.append((prefix + child.name, path, child))
                inner = f"{prefix}{child.name}."
            visit(child, inner, path)

    for path in product_files():
        if path.suffix == ".py" and (path.parts[0] == "tests" if in_tests else path.parts[0] not in NOT_PRODUCT):
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            found.append(("", path, tree))
            visit(tree, "", path)
    return found


def plant(mutant: Mutant) -> tuple[Path, str]:
    """The file that the fault is in, and its text with it; `DoesNotApply` unless there is exactly one place."""
    file, _, name = mutant.function.rpartition(":")
    places = [(path, node) for found, path, node in functions(False) if found == name and path.name.endswith(file)]
    if len(places) != 1:
        raise DoesNotApply(f"there are {len(places)} functions {mutant.function}")
    path, function = places[0]
    old, new = ast.parse(mutant.old).body[0], ast.parse(mutant.new).body[0]
    is_expression = isinstance(old, ast.Expr) and isinstance(new, ast.Expr)
    kind = ast.expr if is_expression else ast.stmt
    nodes = [node for node in ast.walk(function) if isinstance(node, kind) and dump(node) == dump(old)]
    if len(nodes) != 1:
        raise DoesNotApply(f"{mutant.function} has {len(nodes)} times `{mutant.old}`")
    lines = (ROOT / path).read_bytes().splitlines(keepends=True)  # Python counts columns in bytes
    begin = sum(map(len, lines[: nodes[0].lineno - 1])) + nodes[0].col_offset
    end = sum(map(len, lines[: nodes[0].end_lineno - 1])) + nodes[0].end_col_offset
    source = b"".join(lines)
    planted = f"({mutant.new})" if is_expression else mutant.new
    return path, (source[:begin] + planted.encode() + source[end:]).decode()


def dump(node: ast.AST) -> str:
    """What is compared: the expression of a statement that is nothing else."""
    return ast.dump(node.value if isinstance(node, ast.Expr) else node)


def find_tests(mutant: Mutant) -> list[str]:
    """pytest's ids of the tests that should notice; `DoesNotApply` if one is not there."""
    ids = []
    for test in mutant.tests.split():
        paths = [path for found, path, _ in functions(True) if found == test.partition("[")[0]]
        if len(paths) != 1:
            raise DoesNotApply(f"there are {len(paths)} tests {test}")
        ids.append(f"{paths[0].as_posix()}::{test}")
    return ids


def check(mutants: list[Mutant]) -> list[str]:
    """Rows that no longer apply, a line each."""
    problems = []
    for mutant in mutants:
        try:
            ast.parse(plant(mutant)[1])
            find_tests(mutant)
        except DoesNotApply as error:
            problems.append(f"{mutant.fault}: {error}")
    return problems


def run_tests(copy: Path, ids: list[str], *options: str) -> tuple[list[str], str]:
    """The tests that fail in a copy of the checkout, and what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", f"--timeout={SECONDS}"]
    # Stored bytecode is trusted by the source's size and second: a fault of the same length would not be run.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([*command, *options, *ids], cwd=copy, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
    if result.returncode not in (0, 1) or bool(failed) != bool(result.returncode):
        raise DoesNotApply(f"pytest ended with {result.returncode}:\n{(result.stdout + result.stderr)[-3000:]}")
    return failed, result.stdout


def run_mutant(mutant: Mutant, copy: Path) -> str:
    """Plant the fault, run its tests, restore the code; prints a line of the table and returns the verdict."""
    started = time.perf_counter()
    path, text = plant(mutant)
    try:
        (copy / path).write_text(text, encoding="utf-8")
        failed, _ = run_tests(copy, find_tests(mutant), "-x")
        verdict, note = ("killed", f"  by {failed[0]}") if failed else ("SURVIVED", "")
    except DoesNotApply as error:
        verdict, note = "NOT RUN", f"  {error}"
    finally:
        shutil.copy2(ROOT / path, copy / path)
    print(f"{verdict:<8} {time.perf_counter() - started:4.0f} s  {mutant.fault}{note}", flush=True)
    return verdict


def copy_checkout(folder: Path) -> None:
    for path in product_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the description of the faults to plant")
    parser.add_argument("--list", action="store_true", help="print the table and end")
    parser.add_argument("--check", action="store_true", help="only whether each fault applies and its tests exist")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.fault]
    if not chosen:
        parser.error(f"no fault's description holds {arguments.only!r}; --list shows all")
    if arguments.list:
        for item in chosen:
            print(f"{item.fault}\n    {item.function}: `{item.old}` becomes `{item.new}`\n    {item.tests}")
        return 0
    problems = check(chosen)
    print(*problems, f"faults to plant: {len(chosen)}, of which {len(problems)} no longer apply", sep="\n")
    if problems or arguments.check:
        return bool(problems)
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copy = Path(temporary)
        copy_checkout(copy)
        failed, output = run_tests(copy, sorted({test for mutant in chosen for test in find_tests(mutant)}))
        if failed:
            print(f"{output[-3000:]}\nThese tests fail without a fault: mend them first.")
            return 1
        others = [mutant.fault for mutant in chosen if run_mutant(mutant, copy) != "killed"]
    print(json.dumps({"faults": len(chosen), "killed": len(chosen) - len(others), "not_killed": others}))
    return bool(others)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DoesNotApply as error:
        sys.exit(str(error))
