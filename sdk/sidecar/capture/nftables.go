// The rules by nftables: one table of ours, for IPv4 and IPv6, which is replaced and
// removed whole, each in one transaction.

package capture

import (
	"context"
	"fmt"
	"strings"
)

const (
	// nftTable is ours, and nobody else's.
	nftTable = "merlon_capture"
	// nftScratch is where check has the kernel say how rules are written.
	nftScratch = "merlon_capture_check"
)

type nftables struct{ nft tool }

func findNFT(ctx context.Context) (*nftables, error) {
	t, err := findTool("nft", "nftables")
	if err != nil {
		return nil, err
	}
	f := &nftables{t}
	if _, err := t.run(ctx, "", "list", "tables"); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *nftables) install(ctx context.Context, r Rules) error {
	_, err := f.nft.run(ctx, replaceTable(nftTable, r.nft(nftTable, false)), "-f", "-")
	return err
}

// replaceTable makes text, which makes a table, take the place of the table: to delete
// it, it has to be there.
func replaceTable(name, text string) string {
	return fmt.Sprintf("table inet %[1]s\ndelete table inet %[1]s\n%[2]s", name, text)
}

func (f *nftables) remove(ctx context.Context) error {
	_, err := f.nft.run(ctx, replaceTable(nftTable, ""), "-f", "-")
	return err
}

func (f *nftables) installed(ctx context.Context) (bool, error) {
	tables, err := f.nft.run(ctx, "", "list", "tables", "inet")
	return hasLine(tables, "table inet "+nftTable), err
}

func hasLine(text, want string) bool {
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) == want {
			return true
		}
	}
	return false
}

// missing has the kernel say how r is written, by a table that is dormant, and compares.
func (f *nftables) missing(ctx context.Context, r Rules) (sentences []string, err error) {
	if there, err := f.installed(ctx); err != nil || !there {
		return []string{"there is no table inet " + nftTable + " in nftables"}, err
	}
	have, err := f.nft.run(ctx, "", "-s", "list", "table", "inet", nftTable)
	if err != nil {
		return nil, err
	}
	if _, err := f.nft.run(ctx, replaceTable(nftScratch, r.nft(nftScratch, true)), "-f", "-"); err != nil {
		return nil, err
	}
	want, err := f.nft.run(ctx, "", "-s", "list", "table", "inet", nftScratch)
	if _, gone := f.nft.run(ctx, replaceTable(nftScratch, ""), "-f", "-"); err == nil {
		err = gone
	}
	if err != nil {
		return nil, err
	}
	return differences(nftChains(have), nftChains(want)), nil
}

// nftChains takes a listing of a table apart: chain → its lines, the hook among them.
func nftChains(listing string) map[string][]string {
	chains, name := map[string][]string{}, ""
	for line := range strings.Lines(listing) {
		line = strings.TrimSpace(line)
		switch fields := strings.Fields(line); {
		case len(fields) == 3 && fields[0] == "chain":
			name = "chain " + fields[1]
		case line == "flags dormant" && name == "":
			// The scratch table's own, or ours if it was put to sleep.
			chains[tableChain] = append(chains[tableChain], line)
		case line == "}":
			name = ""
		case line != "" && name != "":
			chains[name] = append(chains[name], line)
		}
	}
	return chains
}

// tableChain is where nftChains has what is of the whole table.
const tableChain = "the table"

// nft is r as a table of that name.
func (r Rules) nft(name string, dormant bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", name)
	if dormant {
		b.WriteString("flags dormant\n")
	}
	if r.OutboundPort != 0 {
		r.nftOutput(&b)
	}
	if len(r.Inbound) > 0 {
		r.nftInput(&b)
	}
	b.WriteString("}\n")
	return b.String()
}

func (r Rules) nftOutput(b *strings.Builder) {
	// Before others' destination NAT, since the first one wins.
	b.WriteString("chain nat_output {\ntype nat hook output priority -101; policy accept;\n")
	r.nftPassing(b)
	fmt.Fprintf(b, "meta skuid %s meta l4proto tcp redirect to :%d\n}\n", r.nftCaptured(), r.OutboundPort)
	if r.UDP == UDPAllow {
		return
	}
	b.WriteString("chain filter_output {\ntype filter hook output priority 0; policy accept;\n")
	r.nftPassing(b)
	if r.UDP == UDPDNS {
		b.WriteString("udp dport 53 return\n")
	}
	fmt.Fprintf(b, "meta skuid %s meta l4proto udp drop\n}\n", r.nftCaptured())
}

// nftPassing lets by what stays on the machine, or goes to excluded networks.
func (r Rules) nftPassing(b *strings.Builder) {
	b.WriteString("oifname \"lo\" return\n")
	if nets := r.nets(false); len(nets) > 0 {
		fmt.Fprintf(b, "ip daddr { %s } return\n", list(nets))
	}
	if nets := r.nets(true); len(nets) > 0 {
		fmt.Fprintf(b, "ip6 daddr { %s } return\n", list(nets))
	}
}

// nftCaptured are the users whose packets are captured. What has no user, such as the
// kernel's own, is not.
func (r Rules) nftCaptured() string {
	if len(r.AppUIDs) > 0 {
		return "{ " + list(r.AppUIDs) + " }"
	}
	return "!= { " + list(r.passing()) + " }"
}

func (r Rules) nftInput(b *strings.Builder) {
	b.WriteString("chain nat_prerouting {\ntype nat hook prerouting priority -101; policy accept;\n")
	for _, in := range r.Inbound {
		fmt.Fprintf(b, "iifname != \"lo\" tcp dport %d redirect to :%d\n", in.App, in.Sidecar)
	}
	// What has come past the redirection: connections from before.
	b.WriteString("}\nchain filter_input {\ntype filter hook input priority 0; policy accept;\n")
	for _, in := range r.Inbound {
		fmt.Fprintf(b, "iifname != \"lo\" tcp dport %d drop\n", in.App)
	}
	b.WriteString("}\n")
}

func list[T any](items []T) string {
	texts := make([]string, len(items))
	for i, item := range items {
		texts[i] = fmt.Sprint(item)
	}
	return strings.Join(texts, ", ")
}
