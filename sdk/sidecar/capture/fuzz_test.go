// Other programs' output: the listings of nft and iptables-save.

package capture

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// kept says how many of the lines of chains there are in all, and whether each is one
// of text's.
func kept(t *testing.T, text string, chains map[string][]string) (n int) {
	t.Helper()
	for name, lines := range chains {
		n += len(lines)
		for _, line := range append([]string{strings.TrimPrefix(name, "chain ")}, lines...) {
			if name != tableChain && !strings.Contains(text, line) {
				t.Errorf("%q is not in the listing %q", line, text)
			}
		}
	}
	return n
}

// A chain that is read is written again as it was, and one line more, or one less, in
// a chain of ours is a difference.
func FuzzListings(f *testing.F) {
	r := rules()
	f.Add(r.nft(nftTable, false), "accept")
	f.Add(r.nft(nftScratch, true), "}")
	f.Add("table inet merlon_capture {\n\tchain nat_output {\n\t\ttype nat hook output priority -101; policy accept;\n\t}\n}\n", "chain x {")
	var save strings.Builder
	for c, rules := range r.iptables(true) {
		fmt.Fprintf(&save, ":%s - [0:0]\n", c.ours)
		for _, rule := range rules {
			fmt.Fprintf(&save, "-A %s %s\n", c.ours, rule)
		}
	}
	f.Add("*nat\n"+save.String()+"COMMIT\n", "-j RETURN")
	f.Add(":A\n-A A\n-A", "")
	f.Fuzz(func(t *testing.T, text, more string) {
		lines := strings.Count(text, "\n") + 1
		nft, ipt := nftChains(text), iptListing(text)
		if n := kept(t, text, nft) + kept(t, text, ipt); n > 2*lines {
			t.Errorf("%d lines of %d", n, lines)
		}
		var again strings.Builder
		for _, name := range slices.Sorted(maps.Keys(nft)) {
			if name == tableChain {
				fmt.Fprintf(&again, "%s\n", strings.Join(nft[name], "\n"))
			}
		}
		for _, name := range slices.Sorted(maps.Keys(nft)) {
			if name != tableChain {
				fmt.Fprintf(&again, "%s {\n%s\n}\n", name, strings.Join(nft[name], "\n"))
			}
		}
		if got := nftChains(again.String()); !maps.EqualFunc(got, nft, slices.Equal) {
			t.Errorf("%q is read as %q, and then as %q", text, nft, got)
		}
		delete(nft, tableChain)
		for name, rules := range nft {
			changed := maps.Clone(nft)
			changed[name] = append(slices.Clone(rules), more)
			if len(differences(changed, nft)) == 0 || len(differences(nft, changed)) == 0 {
				t.Errorf("a line more, %q, in %s makes no difference", more, name)
			}
		}
		for name, rules := range ipt {
			again.Reset()
			fmt.Fprintf(&again, ":%s - [0:0]\n", name)
			for _, rule := range rules {
				fmt.Fprintf(&again, "-A %s %s\n", name, rule)
			}
			if got, there := iptListing(again.String())[name]; !there || !slices.Equal(got, rules) {
				t.Errorf("%s: %q is read otherwise again: %q", name, rules, got)
			}
		}
	})
}
