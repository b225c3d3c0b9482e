// Picks the command. Everything else is in cli/.

import { PORT_TAKEN_EXIT_CODE } from "./api/server.ts";
import { helpText, readArguments, USAGE_EXIT_CODE } from "./cli/command.ts";
import { commands, LATER_COMMANDS } from "./cli/commands.ts";
import { endWhenOutputFails, ignoreOutputFailures } from "./cli/standard-streams.ts";
import { asCaravanError, CaravanError } from "./errors.ts";
import { VERSION } from "./version.ts";

const DEFAULT_COMMAND = "serve";

function overview(): string {
  const shown = commands.filter((command) => command.internal !== true);
  const width = Math.max(...shown.map((command) => command.name.length));
  return [
    `caravan ${VERSION} — Llama 4 and Llama on one machine or several`,
    "",
    "usage: caravan COMMAND …        (no command: serve)",
    "",
    ...shown.map((command) => `  ${command.name.padEnd(width)}  ${command.summary}`),
    "",
    "MODEL is a name of `caravan models` or `caravan models --cards`, a hub repository org/name, or a folder.",
    "`caravan COMMAND --help` shows a command's options; `caravan --version` the version.",
    "",
  ].join("\n");
}

async function main(argv: readonly string[]): Promise<number> {
  const first = argv[0];
  endWhenOutputFails();
  if (first === "--version" || first === "-V" || first === "version") {
    process.stdout.write(`caravan ${VERSION}\n`);
    return 0;
  }
  if (first === "--help" || first === "-h" || first === "help") {
    const about = commands.find((command) => command.name === argv[1]);
    process.stdout.write(about === undefined ? overview() : helpText(about));
    return 0;
  }
  const named = first !== undefined && !first.startsWith("-");
  const name = named ? first : DEFAULT_COMMAND;
  const command = commands.find((candidate) => candidate.name === name);
  const later = LATER_COMMANDS[name];
  if (later !== undefined) {
    throw new CaravanError("not_built_yet", `\`caravan ${name}\` is not built yet: it comes with ${later}`);
  }
  if (command === undefined) {
    process.stderr.write(`caravan: there is no command "${name}"\n\n${overview()}`);
    return USAGE_EXIT_CODE;
  }
  const args = readArguments(command, named ? argv.slice(1) : argv);
  if (args.flag("help")) {
    process.stdout.write(helpText(command));
    return 0;
  }
  if (command.outlivesOutput === true) ignoreOutputFailures();
  return await command.run(args);
}

/** 2: the command line or its input is wrong. 69: the port is taken. 1: everything else. */
function exitCode(error: CaravanError): number {
  if (error.code !== "invalid_argument") return 1;
  return error.param === "--port" ? PORT_TAKEN_EXIT_CODE : USAGE_EXIT_CODE;
}

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (thrown) {
  const error = asCaravanError(thrown);
  process.stderr.write(`caravan: ${error.toText()}\n`);
  if (error.code === "internal_error" && thrown instanceof Error && process.env.CARAVAN_DEBUG) {
    process.stderr.write(`${thrown.stack}\n`);
  }
  process.exitCode = exitCode(error);
}
