// caravan config: the settings in force, where each comes from, and whether they are in order.

import { checkServing } from "../api/server.ts";
import { loadSettings, type SettingName } from "../settings.ts";
import { type Command, usage } from "./command.ts";
import { table } from "./table.ts";

const SECRET = /_keys$/;

/** What may be shown of a setting: of keys only how many there are. */
function shown(name: string, value: unknown): string {
  if (SECRET.test(name) && Array.isArray(value)) return value.length === 0 ? "none" : `${value.length} set`;
  return Array.isArray(value) ? value.join(", ") || "none" : String(value) || "none";
}

export const configCommand: Command = {
  name: "config",
  summary: "check the settings and show where they come from",
  positionals: "[check|show]",
  count: [0, 1],
  options: { json: { help: "print JSON; keys are left out" } },
  details: `check   read caravan.toml and the variables, and say what is wrong, with the line (the default)
show    the same, and every setting with its value and its source`,
  async run(args) {
    const [what = "check"] = args.positionals;
    if (what !== "check" && what !== "show") throw usage(`caravan config takes check or show, not "${what}"`);
    // Throws with the file and its line where something is wrong.
    const { settings, sources, file, warnings } = loadSettings();
    // What a server with these settings would refuse to start with.
    checkServing({
      host: settings.host,
      keyed: settings.api_keys.length + settings.admin_keys.length > 0,
      ...(settings.tls_cert === "" ? {} : { tls: { cert: settings.tls_cert, key: settings.tls_key } }),
    });
    const names = Object.keys(settings) as SettingName[];
    if (args.flag("json")) {
      const all = names.map((name) => ({
        name,
        value: SECRET.test(name) ? shown(name, settings[name]) : settings[name],
        source: sources[name],
      }));
      process.stdout.write(`${JSON.stringify({ file: file ?? null, warnings, settings: all })}\n`);
    } else {
      for (const warning of warnings) process.stderr.write(`caravan: ${warning}\n`);
      if (what === "show")
        process.stdout.write(
          table([
            ["SETTING", "VALUE", "FROM"],
            ...names.map((name) => [name, shown(name, settings[name]), sources[name]]),
          ]),
        );
      process.stdout.write(file === undefined ? "no caravan.toml: defaults\n" : `${file} is in order\n`);
    }
    return warnings.length === 0 ? 0 : 1;
  },
};
