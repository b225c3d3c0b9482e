// What a command of the command line is, how its arguments are read, and how its help looks. Every command is one
// file that exports a Command; main.ts lists them.

import { parseArgs } from "node:util";
import { CaravanError } from "../errors.ts";

export interface OptionSpec {
  /** Placeholder of the value in help; absent = a switch. */
  value?: string;
  short?: string;
  help: string;
  /** May be given more than once. */
  many?: boolean;
  /** What the option will belong to; giving it ends with not_built_yet. */
  later?: string;
}

export interface Command {
  name: string;
  /** One line for the list of commands. */
  summary: string;
  /** Positional arguments in help, for example `MODEL [PROMPT]`. */
  positionals: string;
  /** Least and most positional arguments. */
  count: [least: number, most: number];
  options: Record<string, OptionSpec>;
  /** Not shown in the list of commands. */
  internal?: boolean;
  /** It goes on when nobody reads its output any more. */
  outlivesOutput?: boolean;
  /** More text for its own help. */
  details?: string;
  /** Returns the exit code. */
  run(args: Arguments): Promise<number>;
}

/** Exit code for a wrong command line. */
export const USAGE_EXIT_CODE = 2;

/** Arguments of one call, read by the command's option table. */
export class Arguments {
  constructor(
    readonly positionals: readonly string[],
    private readonly values: Readonly<Record<string, string | boolean | string[] | undefined>>,
  ) {}

  flag(name: string): boolean {
    return this.values[name] === true;
  }

  text(name: string): string | undefined {
    const value = this.values[name];
    return typeof value === "string" ? value : undefined;
  }

  list(name: string): string[] {
    const value = this.values[name];
    return Array.isArray(value) ? value : typeof value === "string" ? [value] : [];
  }

  required(name: string): string {
    const value = this.text(name);
    if (value === undefined) throw usage(`--${name} is missing`);
    return value;
  }

  positional(index: number): string {
    const value = this.positionals[index];
    if (value === undefined) throw usage("an argument is missing");
    return value;
  }

  /** A whole number between least and most. */
  integer(name: string, least: number, most: number): number | undefined {
    const text = this.text(name);
    if (text === undefined) return undefined;
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < least || value > most) {
      throw usage(`--${name} takes a whole number from ${least} to ${most}, not "${text}"`);
    }
    return value;
  }

  number(name: string, least: number, most: number): number | undefined {
    const text = this.text(name);
    if (text === undefined) return undefined;
    const value = Number(text);
    if (text.trim() === "" || !Number.isFinite(value) || value < least || value > most) {
      throw usage(`--${name} takes a number from ${least} to ${most}, not "${text}"`);
    }
    return value;
  }

  choice<T extends string>(name: string, choices: readonly T[]): T | undefined {
    const text = this.text(name);
    if (text === undefined) return undefined;
    const found = choices.find((choice) => choice === text);
    if (found === undefined) throw usage(`--${name} is one of ${choices.join(", ")}, not "${text}"`);
    return found;
  }
}

export function usage(message: string): CaravanError {
  return new CaravanError("invalid_argument", message, { where: "command line" });
}

/** Reads a command's arguments. Throws invalid_argument (usage) or not_built_yet. */
export function readArguments(command: Command, argv: readonly string[]): Arguments {
  const options = Object.fromEntries(
    Object.entries({ ...command.options, help: { help: "", short: "h" } as OptionSpec }).map(
      ([name, spec]) => [
        name,
        {
          type: spec.value === undefined ? ("boolean" as const) : ("string" as const),
          ...(spec.short === undefined ? {} : { short: spec.short }),
          ...(spec.many ? { multiple: true } : {}),
        },
      ],
    ),
  );
  let parsed: { values: Record<string, unknown>; positionals: string[] };
  try {
    parsed = parseArgs({ args: [...argv], options, allowPositionals: true, strict: true });
  } catch (thrown) {
    throw usage(
      `${thrown instanceof Error ? thrown.message : thrown} (see \`caravan ${command.name} --help\`)`,
    );
  }
  const values = parsed.values as Record<string, string | boolean | string[] | undefined>;
  for (const [name, spec] of Object.entries(command.options)) {
    if (spec.later !== undefined && values[name] !== undefined) {
      throw new CaravanError("not_built_yet", `--${name} is not built yet: it comes with ${spec.later}`);
    }
  }
  const [least, most] = command.count;
  const given = parsed.positionals.length;
  if (values.help !== true && (given < least || given > most)) {
    throw usage(
      `\`caravan ${command.name}\` takes ${command.positionals || "no arguments"} (see \`caravan ${command.name} --help\`)`,
    );
  }
  return new Arguments(parsed.positionals, values);
}

/** The help of one command. */
export function helpText(command: Command): string {
  const rows = Object.entries(command.options).map(([name, spec]) => [
    `${spec.short === undefined ? "    " : `-${spec.short}, `}--${name}${spec.value === undefined ? "" : ` ${spec.value}`}`,
    spec.later === undefined ? spec.help : `${spec.help} (not built yet)`,
  ]);
  const width = Math.max(10, ...rows.map(([left]) => (left ?? "").length));
  const lines = rows.map(([left, right]) => `  ${(left ?? "").padEnd(width)}  ${right}`);
  return [
    `caravan ${[command.name, command.positionals].join(" ").trim()} ${lines.length === 0 ? "" : "[options]"}`.trimEnd(),
    `  ${command.summary}`,
    ...(command.details === undefined ? [] : ["", command.details]),
    ...(lines.length === 0 ? [] : ["", "options", ...lines]),
    "",
  ].join("\n");
}
