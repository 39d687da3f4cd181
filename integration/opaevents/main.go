// Command opaevents reads events of a decision log, one a line, with the types of
// OPA's own decision-log plugin, and writes what these make of each. A key that they
// do not know is an error. It is a module of its own, since it needs far more than
// Merlon does.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"

	"github.com/open-policy-agent/opa/v1/plugins/logs"
)

func main() { os.Exit(main1()) }

func main1() int {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		if err := event(lines.Bytes()); err != nil {
			fmt.Fprintf(os.Stderr, "opaevents: line %d: %v\n", n, err)
			return 1
		}
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintln(os.Stderr, "opaevents:", err)
		return 1
	}
	return 0
}

// event reads one line, as a mask policy would see it too.
func event(line []byte) error {
	var e logs.EventV1
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&e); err != nil {
		return err
	}
	if _, err := e.AST(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(e)
}
