// Running nft, iptables-restore and the like, and telling what differs in what they say.

package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// tool is a program by its path.
type tool string

// ErrNoTool says that a program is not installed.
var ErrNoTool = errors.New("is not installed")

// findTool finds a program, also in the places where it is installed for root.
func findTool(name, pkg string) (tool, error) {
	for _, dir := range append([]string{""}, "/usr/sbin/", "/sbin/") {
		if path, err := exec.LookPath(dir + name); err == nil {
			return tool(path), nil
		}
	}
	return "", fmt.Errorf("%s %w: apt-get install %s", name, ErrNoTool, pkg)
}

// run gives the program input, and returns what it prints.
func (t tool) run(ctx context.Context, input string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, string(t), args...) //nolint:gosec // nft and iptables, by findTool; what args and input hold are numbers and networks
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdin = strings.NewReader(input)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", t, strings.Join(args, " "), err, strings.TrimSpace(said.String()))
	}
	return out.String(), nil
}

// differences says what of want is not in have, chain by chain, and what have has in a
// chain beside that.
func differences(have, want map[string][]string) (sentences []string) {
	for _, name := range slices.Sorted(maps.Keys(want)) {
		lines, there := have[name]
		switch {
		case name == tableChain:
		case !there:
			sentences = append(sentences, fmt.Sprintf("%s is missing", name))
		case !slices.Equal(lines, want[name]):
			sentences = append(sentences, differing(name, lines, want[name])...)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if _, wanted := want[name]; !wanted {
			sentences = append(sentences, fmt.Sprintf("%s is there, and is not asked for", name))
		}
		if name == tableChain {
			sentences = append(sentences, "the table is dormant")
		}
	}
	return sentences
}

func differing(name string, have, want []string) (sentences []string) {
	for _, line := range want {
		if !slices.Contains(have, line) {
			sentences = append(sentences, fmt.Sprintf("%s lacks: %s", name, line))
		}
	}
	for _, line := range have {
		if !slices.Contains(want, line) {
			sentences = append(sentences, fmt.Sprintf("%s has beside: %s", name, line))
		}
	}
	if len(sentences) == 0 {
		sentences = append(sentences, name+" has its rules in another order")
	}
	return sentences
}
