// The rules by iptables and ip6tables: chains of ours and one jump to each, written by
// iptables-restore --noflush, which changes a table in one step. The filter comes
// first, so that nothing reaches the app while there is no redirection yet.

package capture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// iptChain is a chain of ours and the one of the kernel's that jumps to it first.
type iptChain struct{ table, ours, from string }

var iptChains = []iptChain{
	{"filter", "MERLON_INPUT", "INPUT"},
	{"filter", "MERLON_OUTPUT", "OUTPUT"},
	{"nat", "MERLON_PREROUTING", "PREROUTING"},
	{"nat", "MERLON_OUTPUT", "OUTPUT"},
}

// iptScratch begins the names of the chains where check has the kernel say how rules
// are written. Nothing jumps there.
const iptScratch = "MERLON_CHECK_"

type iptables struct{ families []iptFamily }

// iptFamily is IPv4 or IPv6.
type iptFamily struct {
	name          string
	v6            bool
	restore, save tool
}

func findIPTables(context.Context) (*iptables, error) {
	f := &iptables{}
	for _, family := range []iptFamily{{name: "IPv4"}, {name: "IPv6", v6: true}} {
		command := "iptables"
		if family.v6 {
			if _, err := os.Stat("/proc/net/if_inet6"); errors.Is(err, os.ErrNotExist) {
				continue // the kernel has none
			}
			command = "ip6tables"
		}
		var err error
		if family.restore, err = findTool(command+"-restore", "iptables"); err != nil {
			return nil, err
		}
		if family.save, err = findTool(command+"-save", "iptables"); err != nil {
			return nil, err
		}
		f.families = append(f.families, family)
	}
	return f, nil
}

func (f *iptables) install(ctx context.Context, r Rules) error {
	for _, family := range f.families {
		for _, table := range []string{"filter", "nat"} {
			if err := family.write(ctx, table, r.iptables(family.v6)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *iptables) remove(ctx context.Context) error {
	for _, family := range f.families {
		for _, table := range []string{"nat", "filter"} {
			if err := family.write(ctx, table, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// write makes the chains of ours in a table what rules has: those without rules go, and
// the others are jumped to first. All of it happens in one step.
func (f iptFamily) write(ctx context.Context, table string, rules map[iptChain][]string) error {
	have, err := f.list(ctx, table)
	if err != nil {
		return err
	}
	var declare, rest strings.Builder
	for _, c := range iptChains {
		if c.table != table {
			continue
		}
		_, there := have[c.ours]
		wanted := rules[c]
		if !there && len(wanted) == 0 {
			continue
		}
		fmt.Fprintf(&declare, ":%s - [0:0]\n", c.ours) // which empties it
		for _, rule := range have[c.from] {
			if rule == c.jump() {
				fmt.Fprintf(&rest, "-D %s %s\n", c.from, rule)
			}
		}
		if len(wanted) == 0 {
			fmt.Fprintf(&rest, "-X %s\n", c.ours)
			continue
		}
		for _, rule := range wanted {
			fmt.Fprintf(&rest, "-A %s %s\n", c.ours, rule)
		}
		fmt.Fprintf(&rest, "-I %s 1 %s\n", c.from, c.jump())
	}
	if declare.Len() == 0 {
		return nil
	}
	return f.load(ctx, table, declare.String()+rest.String())
}

func (c iptChain) jump() string { return "-j " + c.ours }

func (f iptFamily) load(ctx context.Context, table, text string) error {
	_, err := f.restore.run(ctx, fmt.Sprintf("*%s\n%sCOMMIT\n", table, text), "--noflush", "--wait")
	return err
}

// list has the rules of each chain of a table.
func (f iptFamily) list(ctx context.Context, table string) (map[string][]string, error) {
	text, err := f.save.run(ctx, "", "-t", table)
	if err != nil {
		return nil, err
	}
	return iptListing(text), nil
}

// iptListing takes what iptables-save prints of a table apart: chain → its rules.
func iptListing(text string) map[string][]string {
	chains := map[string][]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, ":"); ok {
			name, _, _ = strings.Cut(name, " ")
			chains[name] = nil
		} else if rule, ok := strings.CutPrefix(line, "-A "); ok {
			name, rest, _ := strings.Cut(rule, " ")
			chains[name] = append(chains[name], rest)
		}
	}
	return chains
}

func (f *iptables) installed(ctx context.Context) (bool, error) {
	for _, family := range f.families {
		for _, table := range []string{"filter", "nat"} {
			have, err := family.list(ctx, table)
			if err != nil {
				return false, err
			}
			for _, c := range iptChains {
				if _, there := have[c.ours]; there && c.table == table {
					return true, nil
				}
			}
		}
	}
	return false, nil
}

func (f *iptables) missing(ctx context.Context, r Rules) (sentences []string, err error) {
	for _, family := range f.families {
		for _, table := range []string{"filter", "nat"} {
			more, err := family.missing(ctx, table, r.iptables(family.v6))
			if err != nil {
				return nil, err
			}
			for _, s := range more {
				sentences = append(sentences, family.name+", table "+table+": "+s)
			}
		}
	}
	return sentences, nil
}

func (f iptFamily) missing(ctx context.Context, table string, rules map[iptChain][]string) (sentences []string, err error) {
	have, err := f.list(ctx, table)
	if err != nil {
		return nil, err
	}
	written, err := f.written(ctx, table, rules)
	if err != nil {
		return nil, err
	}
	has, wants := map[string][]string{}, map[string][]string{}
	for _, c := range iptChains {
		if c.table != table {
			continue
		}
		if lines, there := have[c.ours]; there {
			has["chain "+c.ours] = lines
		}
		if len(rules[c]) == 0 {
			continue
		}
		wants["chain "+c.ours] = written[c.ours]
		if first := have[c.from]; len(first) == 0 || first[0] != c.jump() {
			sentences = append(sentences, fmt.Sprintf("chain %s does not begin with a jump to %s", c.from, c.ours))
		}
	}
	return append(sentences, differences(has, wants)...), nil
}

// written is how the kernel writes rules: chain of ours → its rules.
func (f iptFamily) written(ctx context.Context, table string, rules map[iptChain][]string) (map[string][]string, error) {
	var declare, fill, drop strings.Builder
	var names []string
	for _, c := range iptChains {
		if c.table != table || len(rules[c]) == 0 {
			continue
		}
		scratch := iptScratch + c.from
		names = append(names, c.ours)
		fmt.Fprintf(&declare, ":%s - [0:0]\n", scratch)
		for _, rule := range rules[c] {
			fmt.Fprintf(&fill, "-A %s %s\n", scratch, rule)
		}
		fmt.Fprintf(&drop, "-X %s\n", scratch)
	}
	if len(names) == 0 {
		return nil, nil
	}
	if err := f.load(ctx, table, declare.String()+fill.String()); err != nil {
		return nil, err
	}
	have, err := f.list(ctx, table)
	if gone := f.load(ctx, table, declare.String()+drop.String()); err == nil {
		err = gone
	}
	written := map[string][]string{}
	for _, c := range iptChains {
		if c.table == table && slices.Contains(names, c.ours) {
			written[c.ours] = have[iptScratch+c.from]
		}
	}
	return written, err
}

// iptables are the rules of each chain of ours.
func (r Rules) iptables(v6 bool) map[iptChain][]string {
	rules := map[iptChain][]string{}
	input, udp, prerouting, output := iptChains[0], iptChains[1], iptChains[2], iptChains[3]
	for _, in := range r.Inbound {
		// What has come past the redirection: connections from before.
		rules[input] = append(rules[input], fmt.Sprintf("! -i lo -p tcp -m tcp --dport %d -j DROP", in.App))
		rules[prerouting] = append(rules[prerouting], fmt.Sprintf("! -i lo -p tcp -m tcp --dport %d -j REDIRECT --to-ports %d", in.App, in.Sidecar))
	}
	if r.OutboundPort == 0 {
		return rules
	}
	rules[output] = append(r.iptPassing(v6), r.iptCaptured("-p tcp", fmt.Sprintf("-j REDIRECT --to-ports %d", r.OutboundPort))...)
	if r.UDP == UDPAllow {
		return rules
	}
	rules[udp] = r.iptPassing(v6)
	if r.UDP == UDPDNS {
		rules[udp] = append(rules[udp], "-p udp -m udp --dport 53 -j RETURN")
	}
	rules[udp] = append(rules[udp], r.iptCaptured("-p udp", "-j DROP")...)
	return rules
}

func (r Rules) iptPassing(v6 bool) []string {
	rules := []string{"-o lo -j RETURN"}
	for _, net := range r.nets(v6) {
		rules = append(rules, fmt.Sprintf("-d %s -j RETURN", net))
	}
	return rules
}

// iptCaptured does what is captured by users. What has no user, such as the kernel's
// own packets, is not.
func (r Rules) iptCaptured(what, do string) (rules []string) {
	for _, uid := range r.AppUIDs {
		rules = append(rules, fmt.Sprintf("%s -m owner --uid-owner %d %s", what, uid, do))
	}
	if len(r.AppUIDs) > 0 {
		return rules
	}
	for _, uid := range r.passing() {
		rules = append(rules, fmt.Sprintf("-m owner --uid-owner %d -j RETURN", uid))
	}
	return append(rules, fmt.Sprintf("%s -m owner --socket-exists %s", what, do))
}
