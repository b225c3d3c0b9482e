// caravan completion: what bash, zsh and fish need to complete commands, options and the names of models. Made from the
// same tables that read the command line, so that nothing is offered that is not understood.

import { openStore, scanStore } from "../model/store.ts";
import { loadSettings } from "../settings.ts";
import { type Command, usage } from "./command.ts";

const SHELLS = ["bash", "zsh", "fish"] as const;

/** Names that MODEL may be: what is here, then cards. */
function modelNames(): string[] {
  const store = openStore(loadSettings().settings.models_dir);
  const here = scanStore(store).models.map(({ name }) => name);
  return [...new Set([...here, ...store.cards.cards.map(({ name }) => name)])];
}

const takesModel = ({ positionals }: Command): boolean => positionals.includes("MODEL");

function optionsOf({ options }: Command): string[] {
  return [...Object.keys(options), "help"].map((name) => `--${name}`);
}

/** Options whose value the shell completes as a file. */
function fileOptions(command: Command): string[] {
  return Object.entries(command.options)
    .filter(([, { value }]) => value === "FILE" || value === "DIR" || value === "FOLDER")
    .map(([name]) => `--${name}`);
}

function bash(commands: readonly Command[]): string {
  const cases = commands.map((command) => {
    const files = fileOptions(command);
    const lines = [`    ${command.name})`];
    if (files.length > 0)
      lines.push(
        `      case "$prev" in ${files.join("|")}) COMPREPLY=($(compgen -f -- "$cur")); return;; esac`,
      );
    lines.push(`      words="${optionsOf(command).join(" ")}"`);
    if (takesModel(command))
      lines.push('      [[ "$cur" == -* ]] || words="$(caravan completion models 2>/dev/null)"');
    lines.push("      ;;");
    return lines.join("\n");
  });
  return `# bash completion for caravan; put into ~/.bashrc:  source <(caravan completion bash)
_caravan() {
  local cur="\${COMP_WORDS[COMP_CWORD]}" prev="\${COMP_WORDS[COMP_CWORD-1]}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "${commands.map(({ name }) => name).join(" ")}" -- "$cur"))
    return
  fi
  case "\${COMP_WORDS[1]}" in
${cases.join("\n")}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _caravan caravan
`;
}

/** For single quotes in zsh and fish. */
function quoted(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function zsh(commands: readonly Command[]): string {
  const cases = commands.map((command) => {
    const specs = Object.entries(command.options).map(([name, { help, value }]) => {
      const text = help.replace(/[[\]:]/g, " ");
      return quoted(`--${name}[${text}]${value === undefined ? "" : `:${value}:_files`}`);
    });
    const rest = takesModel(command) ? ["'1:model:($(caravan completion models 2>/dev/null))'"] : [];
    return `    ${command.name}) _arguments ${[...specs, ...rest, "'*:file:_files'"].join(" ")} ;;`;
  });
  return `#compdef caravan
# zsh completion for caravan; put into ~/.zshrc:  source <(caravan completion zsh)
_caravan() {
  if (( CURRENT == 2 )); then
    local -a commands=(
${commands.map(({ name, summary }) => `      ${quoted(`${name}:${summary}`)}`).join("\n")}
    )
    _describe command commands
    return
  fi
  local name=$words[2]
  shift words; (( CURRENT-- ))
  case $name in
${cases.join("\n")}
  esac
}
compdef _caravan caravan
`;
}

/** For single quotes in fish. */
function fishQuoted(text: string): string {
  return `'${text.replace(/[\\']/g, "\\$&")}'`;
}

function fish(commands: readonly Command[]): string {
  const lines = [
    "# fish completion for caravan; put into ~/.config/fish/completions/caravan.fish",
    "complete -c caravan -f",
  ];
  for (const command of commands) {
    lines.push(
      `complete -c caravan -n __fish_use_subcommand -a ${command.name} -d ${fishQuoted(command.summary)}`,
    );
    const here = `-n '__fish_seen_subcommand_from ${command.name}'`;
    if (takesModel(command))
      lines.push(`complete -c caravan ${here} -a '(caravan completion models 2>/dev/null)'`);
    for (const [name, { help, short, value }] of Object.entries(command.options)) {
      const parts = [
        `complete -c caravan ${here} -l ${name}`,
        ...(short === undefined ? [] : [`-s ${short}`]),
        ...(value === undefined ? [] : ["-r"]),
        `-d ${fishQuoted(help)}`,
      ];
      lines.push(parts.join(" "));
    }
  }
  return `${lines.join("\n")}\n`;
}

export const completion: Command = {
  name: "completion",
  summary: "print the completion script of a shell",
  positionals: "bash|zsh|fish",
  count: [1, 1],
  options: {},
  details: "bash and zsh: source <(caravan completion bash); fish: caravan completion fish | source",
  async run(args) {
    const [what] = args.positionals;
    if (what === "models") {
      process.stdout.write(
        modelNames()
          .map((name) => `${name}\n`)
          .join(""),
      );
      return 0;
    }
    const { commands } = await import("./commands.ts");
    const shown = commands.filter(({ internal }) => internal !== true);
    const shell = SHELLS.find((each) => each === what);
    if (shell === undefined) throw usage(`caravan completion takes ${SHELLS.join(", ")}, not "${what}"`);
    process.stdout.write({ bash, zsh, fish }[shell](shown));
    return 0;
  },
};
