package decisionlog

// This file writes a record as an event of OPA's decision log: the call in
// opa-envoy-plugin's shape, as a stock OPA logs it that answers from the same
// policy bundle. What OPA has no word for is under custom.merlon.

import (
	"encoding/json"
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"merlon.dev/policy"
)

// Mask says which parts of a call an event may show that can carry secrets. What is
// not listed never appears.
type Mask struct {
	// Headers are names of headers, in lower case.
	Headers []string
	// Query are names of parameters of the query.
	Query []string
}

// Format is what all events of a log have in common.
type Format struct {
	// Labels are the instance's; "id" names it. They are asked for with each event.
	Labels func() map[string]string
	// Bundle is the name of the policy bundle.
	Bundle string
	Mask   Mask
}

// The event, with OPA's names and in OPA's order.
type event struct {
	Labels      map[string]string     `json:"labels"`
	DecisionID  policy.DecisionID     `json:"decision_id"`
	Bundles     map[string]bundleInfo `json:"bundles,omitempty"`
	Path        string                `json:"path"`
	Input       input                 `json:"input"`
	Result      result                `json:"result"`
	Erased      []string              `json:"erased,omitempty"`
	RequestedBy string                `json:"requested_by,omitempty"`
	Timestamp   time.Time             `json:"timestamp"`
	Custom      custom                `json:"custom"`
}

type bundleInfo struct {
	Revision string `json:"revision"`
}

// decisionPath is where a policy bundle has its decision.
const decisionPath = "merlon/decision"

type result struct {
	Allow  bool          `json:"allow"`
	Reason policy.Reason `json:"reason"`
	RuleID string        `json:"rule_id"`
}

type input struct {
	Attributes attributes      `json:"attributes"`
	Protocol   policy.Protocol `json:"protocol"`
}

type attributes struct {
	Source      peer     `json:"source"`
	Destination peer     `json:"destination"`
	Request     *request `json:"request,omitempty"`
}

type peer struct {
	Principal string   `json:"principal"`
	Address   *address `json:"address,omitempty"`
}

type address struct {
	SocketAddress socketAddress `json:"socketAddress"`
}

type socketAddress struct {
	Address   string `json:"address"`
	PortValue int    `json:"portValue,omitempty"`
}

type request struct {
	HTTP httpRequest `json:"http"`
}

type httpRequest struct {
	Method     string              `json:"method"`
	Path       string              `json:"path"`
	Host       string              `json:"host,omitempty"`
	Headers    map[string]string   `json:"headers,omitempty"`
	HeadersAll map[string][]string `json:"headers_all,omitempty"`
}

type custom struct {
	Merlon merlon `json:"merlon"`
}

type merlon struct {
	// SampleRate is there where an allowed call was chosen from others: it stands
	// for Allowed of them, itself included, so the rate is 1/Allowed.
	SampleRate float64 `json:"sample_rate,omitempty"`
	Allowed    uint64  `json:"allowed,omitempty"`
	// LetThrough says that the service was in audit mode and served a call that was
	// denied.
	LetThrough bool `json:"let_through,omitempty"`
	// WouldDiffer are the dry-run grants that would have decided otherwise.
	WouldDiffer []string `json:"would_differ,omitempty"`
	// Incomplete are the parts of the call that are not here as a whole.
	Incomplete []string `json:"incomplete,omitempty"`
	// Dropped is how many decisions should stand before this one and do not.
	Dropped uint64 `json:"dropped,omitempty"`

	SourceSerial string `json:"source_serial,omitempty"`
}

// JSON pointers to what a mask took away, as OPA lists them.
const (
	erasedHeaders = "/input/attributes/request/http/headers"
	erasedQuery   = "/input/parsed_query"
)

// Line is rec as one line, without its end. dropped is how many decisions should
// stand before it.
func (f *Format) Line(rec *Record, dropped uint64) []byte {
	in, d := rec.Input(), rec.Decision()
	e := event{
		Labels: f.labels(), DecisionID: d.DecisionID, Path: decisionPath, RequestedBy: in.SourceAddress, Timestamp: rec.At().UTC(),
		Result: result{Allow: d.Allow, Reason: d.Reason, RuleID: d.RuleID},
		Input: input{Protocol: in.Protocol, Attributes: attributes{
			Source:      peer{in.Source, addressOf(in.SourceAddress)},
			Destination: peer{in.Destination, addressOf(in.DestinationAddress)},
		}},
		Custom: custom{merlon{
			LetThrough: d.LetThrough, WouldDiffer: d.DryRun, Incomplete: rec.Incomplete().Names(), Dropped: dropped, SourceSerial: in.SourceSerial,
		}},
	}
	if d.Revision > 0 {
		e.Bundles = map[string]bundleInfo{f.Bundle: {strconv.FormatUint(d.Revision, 10)}}
	}
	if d.Allow && len(d.DryRun) == 0 {
		e.Custom.Merlon.Allowed, e.Custom.Merlon.SampleRate = rec.StandsFor(), 1/float64(rec.StandsFor())
	}
	if in.Protocol != policy.TCP {
		e.Input.Attributes.Request, e.Erased = f.request(in)
	}
	line, err := json.Marshal(&e)
	if err != nil { // there is nothing in it that could not be written
		panic("decisionlog: " + err.Error())
	}
	return Printable(line)
}

func (f *Format) labels() map[string]string {
	if f.Labels == nil {
		return map[string]string{}
	}
	return f.Labels()
}

// request is the call's, and what of it the mask takes away.
func (f *Format) request(in *policy.Input) (r *request, erased []string) {
	r = &request{httpRequest{Method: in.Method, Path: in.Path, Host: in.Host}}
	query, whole := f.Mask.query(in.Query)
	if query != "" {
		r.HTTP.Path += "?" + query
	}
	if !whole {
		erased = append(erased, erasedQuery)
	}
	headers, kept := in.HeaderMap(), 0
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		if !slices.Contains(f.Mask.Headers, name) {
			continue
		}
		if kept++; kept == 1 {
			r.HTTP.Headers, r.HTTP.HeadersAll = map[string]string{}, map[string][]string{}
		}
		r.HTTP.Headers[name], r.HTTP.HeadersAll[name] = strings.Join(headers[name], ","), headers[name]
	}
	if kept < len(headers) {
		erased = append(erased, erasedHeaders)
	}
	return r, erased
}

// query keeps the parameters that are listed, as they are written; whole says that
// they are all.
func (m *Mask) query(raw string) (kept string, whole bool) {
	if raw == "" {
		return "", true
	}
	var parts []string
	all := strings.Split(raw, "&")
	for _, part := range all {
		name, _, _ := strings.Cut(part, "=")
		if name, err := url.QueryUnescape(name); err == nil && slices.Contains(m.Query, name) {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, "&"), len(parts) == len(all)
}

func addressOf(s string) *address {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return nil
	}
	n, _ := strconv.Atoi(port)
	return &address{socketAddress{host, n}}
}
