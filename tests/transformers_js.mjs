// What a browser reads from an exported folder: node transformers_js.mjs FOLDERS NAME QUESTIONS prints answers as JSON.
import { AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, env, pipeline } from "@huggingface/transformers";
import { readFileSync } from "node:fs";

const [folders, name, path] = process.argv.slice(2);
const questions = JSON.parse(readFileSync(path, "utf-8"));
env.localModelPath = folders;
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const write = await pipeline("text-generation", name, { dtype: questions.dtype });
const length = { max_new_tokens: questions.new_tokens, do_sample: false };

class Force extends LogitsProcessor {
  constructor(id) { super(); this.id = id; }
  _call(ids, logits) { for (const row of logits) row.data[this.id] = 1e6; return logits; }
}

async function ends(id) {
  const forced = new LogitsProcessorList();
  forced.push(new Force(id));
  const inputs = tokenizer("a");
  const written = await write.model.generate({ ...inputs, max_new_tokens: 3, do_sample: false, logits_processor: forced });
  return written.dims[1] === inputs.input_ids.dims[1] + 1;
}

const answers = { ids: questions.texts.map((text) => tokenizer.encode(text)), stops: [] };
if (questions.messages) {
  const options = { tokenize: false, add_generation_prompt: true };
  answers.chat = tokenizer.apply_chat_template(questions.messages, options);
}
answers.written = (await write(questions.prompt, length))[0].generated_text;
for (const id of questions.stop_ids) answers.stops.push(await ends(id));
console.log(JSON.stringify(answers));
