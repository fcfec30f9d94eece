// Says what in the dashboards is not what Grafana's types allow: `node validate.mjs SCHEMA DASHBOARD…`.
import Ajv from 'ajv';
import fs from 'node:fs';

const [schema, ...files] = process.argv.slice(2);
const grafana = JSON.parse(fs.readFileSync(schema, 'utf8'));
// What an annotation asks is the data source's own affair, and in no type of Grafana's.
grafana.definitions.Checked.properties.annotations.properties.list.items.additionalProperties = true;
const validate = new Ajv({ strict: false, allErrors: true }).compile(grafana);
let failed = false;
for (const file of files) {
  if (!validate(JSON.parse(fs.readFileSync(file, 'utf8')))) {
    failed = true;
    for (const error of validate.errors) {
      console.log(`${file}${error.instancePath}: ${error.message} ${JSON.stringify(error.params)}`);
    }
  }
}
process.exit(failed ? 1 : 0);
