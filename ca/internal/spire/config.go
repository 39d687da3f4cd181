// What both configuration files have in common: settings become lines of YAML, and
// what none is made of is named.

package spire

import (
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"time"
)

// config is one file on its way.
type config struct {
	remarks
	root *setting
	yaml strings.Builder
}

// put writes a line of YAML; an empty value is left to the default.
func (c *config) put(key, value string) {
	if value != "" {
		fmt.Fprintf(&c.yaml, "%s: %s\n", key, quoted(value))
	}
}

func (c *config) putList(key string, values []string) {
	var texts []string
	for _, v := range values {
		texts = append(texts, quoted(v))
	}
	fmt.Fprintf(&c.yaml, "%s: [%s]\n", key, strings.Join(texts, ", "))
}

// quoted is a string as JSON has it, which YAML reads alike.
func quoted(s string) string {
	text, err := json.Marshal(strings.ToValidUTF8(s, "?"))
	if err != nil {
		panic("spire: a string does not encode: " + err.Error())
	}
	return string(text)
}

// finish names what nobody took.
func (c *config) finish(known nothing) {
	c.root.leftover("", func(path string, s *setting) {
		why := known.about(path)
		switch {
		case s.saysNothing(path):
		case why != "":
			c.missing(s.line, path, "%s", why)
		default:
			c.missing(s.line, path, "unknown key: nothing is made of it")
		}
	})
}

// ttl takes a lifetime, at most what is issued here.
func (c *config) ttl(key string, longest time.Duration, path ...string) {
	text := c.root.take(path...)
	if text == "" {
		return
	}
	of, line := strings.Join(path, "."), c.root.at(path...).line
	d, err := time.ParseDuration(text)
	switch {
	case err != nil || d <= 0:
		c.missing(line, of, "%q is no lifetime", text)
		return
	case longest > 0 && d > longest:
		c.note(line, of, "%s becomes %s, the longest here", d, longest)
		d = longest
	}
	fmt.Fprintf(&c.yaml, "%s: %s\n", key, d)
}

// log takes the settings of logs.
func (c *config) log(section string) {
	level := strings.ToLower(c.root.take(section, "log_level"))
	if level == "warning" {
		level = "warn"
	}
	c.put("log_level", level)
	c.put("log_format", strings.ToLower(c.root.take(section, "log_format")))
}

// address joins host and port, of which either may be missing.
func (c *config) address(section, hostKey, portKey, host, port string) string {
	if v := c.root.take(section, hostKey); v != "" {
		host = v
	}
	if v := c.root.take(section, portKey); v != "" {
		port = v
	}
	return net.JoinHostPort(host, port)
}

// health takes health_checks.
func (c *config) health() {
	if c.root.take("health_checks", "listener_enabled") != "true" {
		return
	}
	c.put("health_address", c.address("health_checks", "bind_address", "bind_port", "localhost", "80"))
	for key, ours := range map[string]string{"live_path": "/live", "ready_path": "/ready"} {
		if v := c.root.at("health_checks", key); v != nil && len(v.values) == 1 && v.values[0] == ours {
			v.taken = true
		}
	}
}

// plugins takes out those that are switched off, and names what comes from elsewhere:
// a plugin of one's own, or settings in another file.
func (c *config) plugins() {
	all := c.root.at("plugins")
	if all == nil {
		return
	}
	for _, kind := range all.below {
		on := kind.below[:0:0]
		for _, p := range kind.below {
			of := "plugins." + kind.key + "." + p.key
			if p.take("enabled") == "false" {
				c.note(p.line, of, "it is not enabled, and left out")
				continue
			}
			if file := p.take("plugin_data_file"); file != "" {
				c.missing(p.line, of+".plugin_data_file", "what is in %s is not read: write it as plugin_data, and translate again", file)
			}
			if cmd := p.take("plugin_cmd"); cmd != "" {
				c.missing(p.line, of+".plugin_cmd", "a plugin of one's own cannot be loaded here")
				p.at("plugin_checksum").takeWhole()
			}
			on = append(on, p)
		}
		kind.taken, kind.below = kind.taken || len(on) < len(kind.below), on
	}
}
